"""Results to look at: one HTML file, pictures, Markdown tables.

page fills templates/ with tables (scores), pictures (examples) and curves (losses). overlay draws
masks on images; markdown formats tables.

Imports base alone.
"""
