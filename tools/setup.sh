#!/usr/bin/env bash
# Sets up the development environment, one stage per call; the Makefile decides which stages are stale.
#   setup.sh packages   .venv with the packages of requirements.lock; with a GPU, torch of requirements-cuda.lock
#   setup.sh build      csrc built in place, the package installed editable
#   setup.sh browser    Chromium for the tests of report.html, if there is none and root can install it
#   setup.sh sglang     .venv-sglang with SGLang, the rollout server
#   setup.sh te         Transformer Engine, built into .venv against its torch
#   setup.sh apex       NVIDIA's apex, built into .venv against its torch
# An interrupted stage is repeated by the next call. MEGATRON_BICC_DEVICE=cpu: as on a host without a GPU.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
packages | build | browser | te | apex) readonly venv=.venv ;;
sglang) readonly venv=.venv-sglang ;;
*) echo "usage: tools/setup.sh packages|build|browser|sglang|te|apex" >&2 && exit 1 ;;
esac
readonly venv_python=$venv/bin/python
# apex has no releases.
readonly APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
pip_install=("$venv_python" -m pip install --disable-pip-version-check)
# Compiling thousands of .pyc files that are never imported costs more than it saves.
pip_install_many=("${pip_install[@]}" --progress-bar off --no-compile)

fail() {
    echo "setup: $*" >&2
    exit 1
}

# A driver that is too old, too: the next check says so.
has_nvidia_gpu() { [[ ${MEGATRON_BICC_DEVICE:-} != cpu ]] && nvidia-smi -L >/dev/null 2>&1; }

# Ends the set-up where the packages of a host with GPUs could not run.
check_gpu_host() { "$venv_python" tools/check_environment.py --before-setup; }

make_venv() {
    "$venv_python" -m pip --version >/dev/null 2>&1 && return
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$PYTHON is not Python 3.11 or newer; name one: make setup PYTHON=python3.11"
    # Without ensurepip (Debian's python3-venv) a venv has no pip.
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON cannot make a virtual environment; on Debian: apt-get install python3-venv"
    "$PYTHON" -m venv --clear "$venv"
}

# pip writes INSTALLER last: without it the package is incomplete, but pip considers it installed.
forget_unfinished_packages() {
    find "$venv/lib" -maxdepth 3 -name '*.dist-info' ! -exec test -e '{}/INSTALLER' ';' -prune -exec rm -r '{}' +
}

install_packages() {
    forget_unfinished_packages
    if ! has_nvidia_gpu; then
        "${pip_install_many[@]}" -r requirements.lock
        return
    fi
    check_gpu_host
    "${pip_install_many[@]}" -r <(grep -v '^torch==' requirements.lock) -r requirements-cuda.lock
    is_cuda_build || echo "setup: there is an NVIDIA GPU, but pip's configuration gave a CPU build of torch" >&2
}

is_cuda_build() { "$venv_python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; }

build_extensions() {
    command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler; on Debian: apt-get install build-essential"
    "$venv_python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' \
        2>/dev/null || fail "Python.h is missing; on Debian: apt-get install python3-dev"
    "${pip_install[@]}" --quiet --no-build-isolation --no-deps -e .
    # The training process imports 4000 modules. Import them once and keep their bytecode, also where
    # PYTHONDONTWRITEBYTECODE is set: without it every process of every run compiles them again, 10 s each.
    env -u PYTHONDONTWRITEBYTECODE "$venv_python" -W ignore -c \
        'import megatron_bicc.train, megatron_bicc.report.page, scipy.stats, hypothesis, pytest, xdist, tensorboard'
}

install_sglang() {
    local locked=requirements-sglang.lock
    forget_unfinished_packages
    if has_nvidia_gpu; then
        check_gpu_host
        # complete, and without resolving: a release of another package changes nothing
        "${pip_install_many[@]}" --no-deps -r requirements-sglang-cuda.lock
        return
    fi
    # only torch is installed with its dependencies: a CPU build has none, a CUDA build many
    "${pip_install_many[@]}" "$(grep -oE '^torch==[^ ]+' $locked)" --constraint $locked
    "${pip_install_many[@]}" --no-deps -r $locked
    local packages
    packages=$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cp -R tools/sglang_cpu/sgl_kernel tools/sglang_cpu/*.py "$packages/"
    printf 'import %s\n' torchvision_operators pageable_host_memory >"$packages/sglang_cpu.pth"
    # imports once what a server imports: checks that it works, and compiles it
    env -u PYTHONDONTWRITEBYTECODE SGLANG_USE_CPU_ENGINE=1 "$venv_python" -W ignore -c \
        'import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler'
}

check_built_against() {
    is_cuda_build ||
        fail "$1 needs a CUDA build of torch in $venv; make setup takes one where nvidia-smi lists a GPU"
    command -v "${CXX:-g++}" >/dev/null || fail "$1 needs a C++ compiler; on Debian: apt-get install build-essential"
    local free_gb
    free_gb=$(($(df --output=avail -k "$venv" | tail -n 1) / 1000000))
    ((free_gb >= 10)) || fail "$1 needs 10 GB of disk to build; $venv has $free_gb GB"
}

build_transformer_engine() {
    check_built_against "Transformer Engine"
    echo "setup: building Transformer Engine takes up to half an hour on few cores; MAX_JOBS=n bounds its memory"
    # what building it needs is imported while the rest is built
    "${pip_install[@]}" --no-deps -r <(grep -v '^transformer-engine-torch==' requirements-te.lock)
    # Without isolation it is built against this torch, not the newest; with the headers of the locked wheels, since a
    # CUDA toolkit has none of cuDNN and NCCL.
    NVTE_BUILD_USE_NVIDIA_WHEELS=1 "${pip_install[@]}" --no-deps --no-build-isolation \
        "$(grep '^transformer-engine-torch==' requirements-te.lock)"
    "$venv_python" -c 'import transformer_engine.pytorch' ||
        fail "Transformer Engine was built, but cannot be imported"
}

build_apex() {
    check_built_against apex
    command -v git >/dev/null || fail "apex needs git; on Debian: apt-get install git"
    local nvcc=${CUDA_HOME:+$CUDA_HOME/bin/}nvcc built have
    command -v "$nvcc" >/dev/null || fail "apex needs nvcc: install the CUDA toolkit, and set CUDA_HOME or PATH to it"
    built=$("$venv_python" -c 'import torch; print(torch.version.cuda)')
    have=$("$nvcc" --version | grep -oE 'release [0-9]+\.[0-9]+' | cut -d' ' -f2)
    [[ $have == "$built" ]] || fail "apex needs nvcc $built, which torch is built with; $nvcc is $have: set CUDA_HOME"
    echo "setup: building apex takes up to half an hour on few cores; MAX_JOBS=n bounds its memory"
    # the project called apex on PyPI is another one
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 "${pip_install[@]}" --no-deps --no-build-isolation \
        "apex @ git+https://github.com/NVIDIA/apex.git@$APEX_COMMIT"
    "$venv_python" -c 'import apex.normalization, amp_C' || fail "apex was built, but cannot be imported"
}

install_browser() {
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        { apt-get -o Acquire::Retries=3 update --quiet &&
            DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::Retries=3 install --quiet --yes \
                --no-install-recommends chromium fonts-dejavu-core; } && return
    fi
    # Other tests do not need it; those that do are skipped with this reason.
    echo "setup: no Chromium: report.html is not tested in a browser; on Debian: apt-get install chromium" >&2
}

case "$1" in
packages)
    make_venv
    install_packages
    ;;
build) build_extensions ;;
browser) install_browser ;;
te) build_transformer_engine ;;
apex) build_apex ;;
sglang)
    make_venv
    install_sglang
    ;;
esac
