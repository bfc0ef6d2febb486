"""One process around one device: work items in, commits out, without Ray.

encode_stage takes items (work) -> lanes overlaps fetch, compute and write -> latents or
features computes one item on device, by draws and prompt_cache, into stored_form ->
store.attempt commits. byte_queue bounds memory; watchdog kills a process that hangs.

Imports decode and below; never Ray, the reader or the training side.
"""
