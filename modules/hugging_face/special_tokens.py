"""Names of the tokens that are no text: our own, and what others call the end of one."""

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
END_OF_TEXT = (
    *(EOS, "<|endoftext|>", "</s>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<｜end▁of▁sentence｜>", "<|end▁of▁sentence|>", "<eos>"),
)
"""In the order in which they are looked for: what ends a whole document before what ends a turn of a chat."""
