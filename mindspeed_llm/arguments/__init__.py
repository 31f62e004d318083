"""What can be asked for: documented dataclasses per subject, and the one parser that reads them.

schema (how an option is declared) -> flags (what a dataclass declares) -> parser (command line, YAML and environment
to dataclass) -> help_text and docs (the same declarations as text). Programs are composed in `programs`, `convert`
and `preprocess`.
"""
