"""What statistics add to the collectives of a step: rows of the table in the documentation."""


def difference(plain, measured):
    """Return what is more, from the numbers in each collective, by its kind."""
    before, after = sum(map(len, plain.values())), sum(map(len, measured.values()))
    more = sum(map(sum, measured.values())) - sum(map(sum, plain.values()))
    return {
        "plain": before,
        "added": after - before,
        "numbers added": more,
        "more in the first step": 0,
    }
