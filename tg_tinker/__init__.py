"""TG-Tinker: fine-tune language models on data they must not leak."""
