"""What must divide what: streams the batch, ranks the streams. Each rule says what is wrong, and the nearest fit."""


def batch_refusal(batch: int, streams: int) -> str:
    """Return why `streams` cannot share batches of `batch` images, '' if they can."""
    if batch % streams == 0:
        return ""
    nearest = max(streams, round(batch / streams) * streams)
    return f"recipe.streams={streams} does not divide recipe.batch={batch}; the nearest batch that works: {nearest}"


def ranks_refusal(world_size: int, streams: int) -> str:
    """Return why `world_size` processes cannot share `streams` streams, '' if they can."""
    if streams % world_size == 0:
        return ""
    counts = [count for count in range(1, streams + 1) if streams % count == 0]
    nearest = min(counts, key=lambda count: abs(count - world_size))
    return (
        f"{world_size} processes do not divide recipe.streams={streams}; "
        f"the nearest process count that works: {nearest}"
    )
