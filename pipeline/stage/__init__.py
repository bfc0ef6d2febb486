"""One process around one device: work items in, commits out, without Ray.

encode_stage takes items (work) -> lanes overlaps the steps of several tasks -> latents or features
encodes one task into one layer: on device, with known prompts or draws, converted by stored_form ->
store.attempt commits. byte_queue bounds memory; watchdog kills a process that hangs.

Imports decode and below; never Ray, the reader or the training side.
"""
