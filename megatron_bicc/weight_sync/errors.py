"""What ends a run at a weight sync."""


class WeightSyncError(RuntimeError):
    """The servers' weights are not, or would not be, the policy's. One line."""
