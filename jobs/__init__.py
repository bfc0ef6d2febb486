"""The command line: ``ldznet VERB``, one thin module a verb, recipes in YAML beside them."""
