"""Models to and from other libraries: folders of Hugging Face transformers (docs/interoperability.md)."""
