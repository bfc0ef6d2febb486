"""Tools that know no corpus, no store and no model.

yaml reads a file into a checked pydantic model · secrets hides credentials in URLs ·
whole_file writes a file that readers see whole · remote_copy downloads with retries ·
progress and progress_text show long work · ray_cluster starts or joins Ray · recent is an
LRU cache · machine describes the computer · failpoints stop a writer where a test asks.

Imports nothing else of pipeline, and no models.
"""
