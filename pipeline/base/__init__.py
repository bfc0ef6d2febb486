"""Tools that know no corpus, no store and no model.

yaml reads a file into a checked pydantic model · secrets hides credentials · whole_file writes
files and folders atomically · child_process starts and ends our own child processes · outages waits
for servers that do not answer · remote_copy downloads · progress and progress_text show long work ·
raster draws polygons · orientation turns pixels upright · json_list reads big lists · ray_cluster
starts or joins Ray · lru_cache · forks renews locks and threads · machine describes the computer ·
failpoints stop a writer where a test asks.

Imports nothing else of pipeline, and no models.
"""
