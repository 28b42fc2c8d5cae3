"""The zero-configuration demo: a real model, real text, two dictionaries, one sentence taken apart."""
