"""Run lengths of a mask as COCO counts them."""


def count_runs(mask):
    """Run lengths by a plain loop down the columns."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    return runs
