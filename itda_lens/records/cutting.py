"""How texts become contexts."""

from dataclasses import dataclass

from itda_lens.records.arguments import at_least, check_fields


@dataclass(frozen=True)
class Cutting:
    """How texts are cut into contexts of tokens, and which tokens count.

    Attributes:
        context_size: tokens per context, the BOS token included, at least 2; longer texts are cut.
        prepend_bos: whether each context begins with the BOS token; None: if the tokenizer has one.
        keep_special_tokens: whether position 0 and special tokens count. By default they do not:
            position 0 draws attention whatever token is there, so its activation tells nothing of the
            text.

    Raises:
        ValueError: `context_size` is below 2.
        TypeError: a field is of another type.
    """

    context_size: int = 128
    prepend_bos: bool | None = None
    keep_special_tokens: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        at_least(2, context_size=self.context_size)

    @classmethod
    def given(
        cls, context_size: int | None, prepend_bos: bool | None, keep_special_tokens: bool
    ) -> "Cutting":
        """The cutting of these arguments, in which None as the context size stands for the default."""
        size = cls.context_size if context_size is None else context_size
        return cls(size, prepend_bos, keep_special_tokens)
