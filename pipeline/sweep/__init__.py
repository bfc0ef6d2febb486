"""Many heads over one store.

run is the start: config -> trials (which runs, checked and named) -> trial (fit one, without
Ray) on Ray Tune -> results (results.parquet and results.md) -> effects and heat_map.

Imports train and below; never the encoding side.
"""
