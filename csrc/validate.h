// Input checks: after them no index computed from the batch can be out of bounds.
#pragma once

#include "batch.h"

namespace bicc {

// Both throw InputError: the message names the setting, or the array with its group and rollout.
void validate(const Settings& settings, int64_t dp_size);
void validate(const Batch& batch, const Settings& settings);

// "group 3, rollout 17"; the rollout is counted over the whole batch. Needs valid group_offsets.
std::string rollout_name(const Batch& batch, int64_t rollout);

}  // namespace bicc
