"""Reads parts of a stored file into memories, and returns what they hold."""


def read_parts(storage, path, *parts):
    """What ``read_into`` fills for (start, lengths) parts, None where it says that some lack."""
    memories = [(start, [bytearray(n) for n in lengths]) for start, lengths in parts]
    if not storage.read_into(path, memories):
        return None
    return [bytes(memory) for _, filled in memories for memory in filled]
