"""Shared-prefix attention: responses attend to a prefix that is computed once for all of them.

Rows are prefix-major: the prefix rows of all sides, then the response rows. A context rank holds whole
segments (prefixes, responses) and chunks of long ones. Variable-length calls and a merge:

    out, lse   = each chunk independently, causal
    outx, lsex = rows against shared keys, not causal: response rows against their own side's prefix, chunks
                 against the rows before them in their segment (attention_calls)
    rows of such a call: lse' = logaddexp(lse, lsex), out' = e^(lse - lse') out + e^(lsex - lse') outx

This is the softmax over the union of all key sets, exactly. Backward calls the same kernels again, all with
the merged out' and lse': a flash kernel recomputes its softmax weights as exp(q k - lse), so with lse' these
are this call's part of the whole softmax, and with out' so is delta = sum(grad * out'). Autograd cannot do
the merge: torch's kernels drop the gradient through the log-sum-exp, which gives wrong dq and dk.

**Context parallel.** Shared keys and values are gathered from all context ranks in the forward pass and again
in the backward pass, so that only a rank's own rows are kept in between; gathering runs while the causal call
computes. Their gradients go back to the ranks that hold the rows, which sum them: rounded once by the sender,
and once after the sum in at least float32 (a reduce-scatter would round at each of its sums). With n context
ranks, the busiest of which sends E rows, b bytes an element, each rank receives in each layer

    2 (n - 1) E G C b      in the forward pass, and again in the backward pass: keys and values
    2 (n - 1) E G C b      in the backward pass: their gradients

With one context rank the shared keys are a slice of its own; nothing is sent or copied.

**Sliding windows** (attention_windows) are one call of all rows, with copies of some keys.

Each device's kernels are a module (attention_cpu, attention_cuda, attention_math) with two functions:

    forward(call) -> (output [Q, H, C], log-sum-exp [H, Q])
    backward(call, grad_QHC, out_QHC, lse_HQ) -> (dq, dk, dv), given out and lse of the whole softmax

Rows of a segment without keys get an output of 0 and a log-sum-exp of -inf. Outputs and gradients are in the
call's type or a wider one. The log-sum-exp is natural and float32 (float64 for float64 inputs).

Shape suffixes: N rows of a context rank, Q query rows, K key rows, H query heads, G key-value heads, C
channels.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_bicc.model import attention_cpu, attention_cuda, attention_math
from megatron_bicc.model.attention_calls import AttentionCalls, Exchange
from megatron_bicc.model.attention_parts import add_gradients, merge
from megatron_bicc.model.attention_windows import WindowCall
from megatron_bicc.model.packed_batch import PackedBatch
from megatron_bicc.model.segments import VarlenCall


def _kernels(q: Tensor) -> ModuleType:
    """Returns the module of kernels for the device and type of `q`."""
    if not q.is_cuda:
        return attention_cpu
    return attention_math if q.dtype in (torch.float32, torch.float64) else attention_cuda


class SharedPrefixAttention(torch.autograd.Function):
    """(q [N, H, C], k [N, G, C], v [N, G, C], calls, context group, scale) -> [N, H, C]. Collective."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        calls: AttentionCalls,
        group: dist.ProcessGroup | None,
        scale: float,
    ) -> Tensor:
        kernels = _kernels(q)
        gathered = _gather(k, v, calls.exchange, group)
        out, lse = kernels.forward(VarlenCall(q, k, v, calls.causal, scale))
        shared_k, shared_v = gathered()
        for call in calls.shared:
            part = VarlenCall(q[call.rows], shared_k[call.keys], shared_v[call.keys], call.segments, scale)
            # a row without keys in this call has -inf in its lse; every row attends at least to itself
            merge(out[call.rows], lse[:, call.rows], *kernels.forward(part))
        # Kernels that compute in a wider type are rounded once, after the merge.
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.group, ctx.scale = calls, group, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        calls, scale, grad = ctx.calls, ctx.scale, grad.contiguous()
        kernels = _kernels(q)
        gathered = _gather(k, v, calls.exchange, ctx.group)
        # all calls get the merged out and lse, so each returns its part of the exact gradient
        dq, dk, dv = kernels.backward(VarlenCall(q, k, v, calls.causal, scale), grad, out, lse)
        shared_k, shared_v = gathered()
        if calls.exchange is None:
            shared_dk, shared_dv = dk, dv
        else:
            returned = dk.new_zeros(len(calls.exchange.keys), 2, *dk.shape[1:])
            shared_dk, shared_dv = returned[:, 0], returned[:, 1]
        for call in calls.shared:
            rows, keys = call.rows, call.keys
            part = VarlenCall(q[rows], shared_k[keys], shared_v[keys], call.segments, scale)
            # a slice of lse [H, N] along N is strided; the CUDA kernel reads contiguous memory
            found = kernels.backward(part, grad[rows], out[rows], lse[:, rows].contiguous())
            add_gradients((dq[rows], shared_dk[keys], shared_dv[keys]), found)
        if calls.exchange is not None:
            _give_back(returned, k.dtype, (dk, dv), calls, ctx.group)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _gather(
    k: Tensor, v: Tensor, exchange: Exchange | None, group: dist.ProcessGroup | None
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Starts to gather the shared keys and values; returns a function that waits for them, [K, G, C] both."""
    if exchange is None:
        return lambda: (k, v)
    sent = torch.stack([x.index_select(0, exchange.sent) for x in (k, v)], dim=1)
    received = sent.new_empty(group.size() * len(sent), *sent.shape[1:])
    work = dist.all_gather_into_tensor(received, sent, group=group, async_op=True)

    def wait() -> tuple[Tensor, Tensor]:
        work.wait()
        shared = received.index_select(0, exchange.keys)
        return shared[:, 0], shared[:, 1]

    return wait


def _give_back(
    shared_K2GC: Tensor,
    dtype: torch.dtype,
    totals: tuple[Tensor, Tensor],
    calls: AttentionCalls,
    group: dist.ProcessGroup,
) -> None:
    """Sends the gradients of shared keys and values, [K, 2, G, C], to the context ranks that hold the rows.

    dtype: what they are sent in. totals: dk and dv [N, G, C] of this rank's rows, to which those that it
    receives are added.
    """
    exchange, wide = calls.exchange, torch.promote_types(dtype, torch.float32)
    ranks, rows = group.size(), exchange.sent[: exchange.count]
    of_rows = shared_K2GC.new_zeros(ranks * len(exchange.sent), *shared_K2GC.shape[1:], dtype=wide)
    for call in calls.shared:
        # no row occurs twice, so that the sum does not depend on the order in which a GPU adds
        of_rows.index_add_(0, exchange.keys[call.keys], shared_K2GC[call.keys].to(wide))
    sent = of_rows.to(dtype)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    own = received.unflatten(0, (ranks, -1))[:, : exchange.count].sum(0, dtype=wide)
    for i, total in enumerate(totals):
        total.index_copy_(0, rows, (total.index_select(0, rows) + own[:, i]).to(total.dtype))


class WindowAttention(torch.autograd.Function):
    """(q [N, H, C], k [N, G, C], v [N, G, C], call, scale) -> [N, H, C], on the only context rank.

    The copies of keys and values are made again in the backward pass: the rows' own are kept.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: WindowCall, scale: float) -> Tensor:
        out, lse = _kernels(q).forward(VarlenCall(q, call.keys(k), call.keys(v), call.segments, scale))
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.scale = call, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (q, k, v, out, lse), call = ctx.saved_tensors, ctx.call
        part = VarlenCall(q, call.keys(k), call.keys(v), call.segments, ctx.scale)
        dq, dk, dv = _kernels(q).backward(part, grad.contiguous(), out, lse)
        dk, dv = call.gradient(dk), call.gradient(dv)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None


def window_of(config: TransformerConfig, layer_number: int) -> int | None:
    """Returns how many keys a row of a layer sees, its own included; None: all. Layers count from 1."""
    if not is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
        return None
    return config.window_size[0] + 1  # megatron-core's window leaves out the row itself


class SharedPrefixCoreAttention(torch.nn.Module):
    """The `core_attention` of megatron-core's layer spec; packed_seq_params holds the calls."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale, self.context_group = config.softmax_scale, pg_collection.cp
        self.window = window_of(config, layer_number)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedBatch | None = None,
    ) -> Tensor:
        """Query [N, 1, H, C], key and value [N, 1, G, C] -> [N, 1, H * C]."""
        q, k, v = (x.squeeze(1) for x in (query, key, value))
        if self.window is None:
            calls = packed_seq_params.attention
            out = SharedPrefixAttention.apply(q, k, v, calls, self.context_group, self.scale)
        else:
            out = WindowAttention.apply(q, k, v, packed_seq_params.window_call(self.window), self.scale)
        return out.reshape(out.shape[0], 1, -1)
