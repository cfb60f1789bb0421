"""The embedded model's tokenizer: whole words, with the layout of Chameleon's, so that one loader reads the whole family.

Ids: 0 <s>, 1 <pad>, 2 </s>, 3 <unk>, then the image codes (id = code + 4, as in Chameleon), then end of image, begin of
image, <image> and the words. A conditional prompt is [<s>, words..., begin of image], the unconditional one
[<s>, begin of image]; the image's codes follow in raster order, without row ends and without an end token.
"""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sjd2.models.tiny.scenes import WORDS

BEGIN_OF_IMAGE, END_OF_IMAGE, IMAGE = "<racm3:break>", "<eoss>", "<image>"  # Chameleon's names
FIRST_CODE = 4  # the id of code 0
LONGEST_PROMPT = 22  # <s>, 20 words, begin of image


def code_name(code: int) -> str:
    """Name an image code as Chameleon's vocabulary does: decimal digits as letters A-J, then Z."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def vocabulary(codes: int) -> dict[str, int]:
    """Number every token: special ones, `codes` image codes in one range, words."""
    images = [*map(code_name, range(codes)), END_OF_IMAGE, BEGIN_OF_IMAGE, IMAGE]
    return {name: index for index, name in enumerate(["<s>", "<pad>", "</s>", "<unk>", *images, *WORDS])}


def build_tokenizer(codes: int) -> PreTrainedTokenizerFast:
    """Make the tokenizer of a model with `codes` image codes; it puts <s> before the words."""
    vocab = vocabulary(codes)
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE, "boi_token": BEGIN_OF_IMAGE, "eoi_token": END_OF_IMAGE},
        padding_side="right",
        model_max_length=LONGEST_PROMPT - 1,
    )


def prompt_ids(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str | None]) -> list[list[int]]:
    """Tokenise prompts, None standing for the unconditional one; every prompt ends with begin of image."""
    begin = tokenizer.get_vocab()[BEGIN_OF_IMAGE]
    return [[*tokenizer(caption or "")["input_ids"], begin] for caption in captions]
