"""Results for people to look at: one HTML file, pictures, Markdown tables.

page (sections to a file) -> tables, curves, pictures by style and text · overlay draws masks on
images · markdown writes tables.

Imports base alone.
"""
