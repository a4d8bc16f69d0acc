"""How byte-level BPE models split text into words before merging, by the name in
tokenizer.ggml.pre.

Each name has a list of patterns that are applied in order.  A pattern splits every piece left by
the previous ones into its matches and the text between them.  Patterns use Oniguruma syntax, as in
the models' own tokenizer.json.  The names are those that llama.cpp's converter writes.
Source: llama.cpp, src/llama-vocab.cpp, and the tokenizer.json of the models.
"""

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers import pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SINGLE_DIGIT = r"\p{N}"
THREE_DIGITS = r"[0-9][0-9][0-9]"

# Branches shared by the patterns of models after GPT-2.
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
WHITESPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
PUNCTUATION_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"

LLAMA3 = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{PUNCTUATION}|{WHITESPACE}"
QWEN2 = rf"{CONTRACTION}|{WORD}|\p{{N}}|{PUNCTUATION}|{WHITESPACE}"
QWEN35 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{WHITESPACE}"
)
SEED_CODER = (
    rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A word that may start with capitals, and one that is all capitals.
CAPITALISED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
)
CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
TEKKEN = rf"{CAPITALISED}|{CAPITALS}|\p{{N}}|{PUNCTUATION_OR_SLASH}|{WHITESPACE}"
GPT4O = (
    rf"{CAPITALISED}{CONTRACTION}?|{CAPITALS}{CONTRACTION}?|\p{{N}}{{1,3}}"
    rf"|{PUNCTUATION_OR_SLASH}|{WHITESPACE}"
)

DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{WHITESPACE}",
)
DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    SINGLE_DIGIT,
)
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, THREE_DIGITS)
DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", THREE_DIGITS)


@dataclass(frozen=True)
class PreTokenizer:
    """How one kind of model splits text.

    patterns        applied in order
    ignore_merges   a word that is a token is encoded as that token, whatever the merges say
    add_bos         whether BOS is added if the file does not say
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """For the tokenizers library: splits, then maps bytes to printable characters."""
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([*splits, to_bytes])


_TABLE = {
    "default": PreTokenizer(DEFAULT),
    "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 mellum gigachat a.x-4.0":
        PreTokenizer((GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2":
        PreTokenizer((SINGLE_DIGIT, GPT2)),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2":
        PreTokenizer((LLAMA3,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe glm4 chatglm-bpe": PreTokenizer((LLAMA3,)),
    "qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez solar-open kormo grok-2":
        PreTokenizer((QWEN2,)),
    "qwen35": PreTokenizer((QWEN35,)),
    "seed-coder": PreTokenizer((SEED_CODER,)),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4 kanana2 minimax-m2": PreTokenizer((GPT4O,)),
    "deepseek-v3 hunyuan-dense joyai-llm": PreTokenizer(DEEPSEEK3),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "falcon": PreTokenizer(FALCON),
}

PRE_TOKENIZERS = {name: entry for names, entry in _TABLE.items() for name in names.split()}
