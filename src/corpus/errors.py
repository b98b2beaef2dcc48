"""The one error of the corpus stage."""


class CorpusError(ValueError):
    """Something about the text, the tokenizer or the token files that the user can mend; the message says how."""
