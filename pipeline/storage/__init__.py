"""Bytes under a URL: what a store needs of a file system or an object store.

interface (the operations and their errors) -> open (a URL to a storage, and the test that one
create wins) -> local (POSIX, by hard link) or s3 (conditional PUT), with s3_upload,
s3_calls, s3_errors, s3_unfinished and aws beside it.

Imports base alone; knows nothing of layers, tasks or arrays.
"""
