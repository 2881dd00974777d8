"""Tiny text encoders, image encoders and tokenizers with one token for each letter."""

from __future__ import annotations

from typing import Any

import transformers

from families.family import fill

LENGTH = 24
LETTERS = [chr(code) for code in range(33, 127)]
CLIP_WORDS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
QWEN_MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
QWEN_WORDS = [*LETTERS, "\u0120", "\u010a", *QWEN_MARKS]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def numbered(words: list[str]) -> dict[str, int]:
    return {word: i for i, word in enumerate(words)}


def clip_tokenizer(length: int = LENGTH) -> Any:
    return transformers.CLIPTokenizer(vocab=numbered(CLIP_WORDS), merges=[], model_max_length=length)


def clip_text(hidden: int = 16, *, projection: int | None = None, length: int = LENGTH) -> Any:
    """A CLIP text encoder, with a projection of that width if one is given."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(CLIP_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        projection_dim=projection or hidden,
        bos_token_id=len(CLIP_WORDS) - 2,
        eos_token_id=len(CLIP_WORDS) - 1,
        pad_token_id=len(CLIP_WORDS) - 1,
    )
    encoder = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return fill(encoder(config))


def clip_vision(projection: int = 16, *, size: int = 16) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection,
        image_size=size,
        patch_size=8 if size < 64 else 32,
    )
    return fill(transformers.CLIPVisionModelWithProjection(config))


def clip_images(size: int = 16) -> Any:
    return transformers.CLIPImageProcessor(crop_size=size, size=size)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def t5_text(hidden: int = 32) -> Any:
    return fill(transformers.T5EncoderModel(transformers.T5Config(**_t5(hidden))))


def umt5_text(hidden: int = 32) -> Any:
    return fill(transformers.UMT5EncoderModel(transformers.UMT5Config(**_t5(hidden))))


def _t5(hidden: int) -> dict[str, Any]:
    return {
        "vocab_size": 4 + len(LETTERS),
        "d_model": hidden,
        "d_kv": 8,
        "d_ff": 2 * hidden,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
    }


def qwen_tokenizer() -> Any:
    tokenizer = transformers.Qwen2Tokenizer(
        vocab=numbered(QWEN_WORDS), merges=[], model_max_length=2048, additional_special_tokens=list(QWEN_MARKS[1:])
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _qwen(hidden: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": len(QWEN_WORDS),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": QWEN_WORDS.index("<|endoftext|>"),
        "eos_token_id": QWEN_WORDS.index("<|endoftext|>"),
        "pad_token_id": QWEN_WORDS.index("<|endoftext|>"),
    }


def qwen_vl_text(hidden: int = 16) -> Any:
    """A Qwen2.5-VL model, of which the pipelines use the hidden states."""
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            **_qwen(hidden, 2),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=QWEN_WORDS.index("<|vision_start|>"),
        vision_end_token_id=QWEN_WORDS.index("<|vision_end|>"),
        image_token_id=QWEN_WORDS.index("<|image_pad|>"),
        video_token_id=QWEN_WORDS.index("<|video_pad|>"),
    )
    return fill(transformers.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_text(hidden: int = 16, *, layers: int = 3, head: bool = True) -> Any:
    """A Qwen3 model, with the layer that predicts words if ``head``."""
    config = transformers.Qwen3Config(**_qwen(hidden, layers), head_dim=8, tie_word_embeddings=True)
    return fill((transformers.Qwen3ForCausalLM if head else transformers.Qwen3Model)(config))


class PictureProcessor(transformers.Qwen2VLProcessor):
    """Reads text and pictures, no videos: what reads videos needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def qwen_vl_processor(tokenizer: Any) -> Any:
    """Reads text and pictures; pictures become 56x56 pixels at most."""
    images = transformers.Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return PictureProcessor(images, tokenizer, chat_template=CHATML)


GEMMA_WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "\u2581", *LETTERS]


def gemma_tokenizer() -> Any:
    return transformers.GemmaTokenizer(vocab=numbered(GEMMA_WORDS), merges=[], model_max_length=512)


def gemma_text(hidden: int = 16) -> Any:
    config = transformers.Gemma2Config(
        vocab_size=len(GEMMA_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return fill(transformers.Gemma2Model(config))


LLAMA_WORDS = ["<unk>", "<s>", "</s>", "<pad>", "\u2581", *LETTERS]


def llama_tokenizer() -> Any:
    return transformers.LlamaTokenizer(vocab=numbered(LLAMA_WORDS), merges=[], pad_token="<pad>", model_max_length=512)


def llama_text(hidden: int = 16) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=len(LLAMA_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    return fill(transformers.LlamaModel(config))


BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]


def bert_tokenizer(length: int) -> Any:
    return transformers.BertTokenizer(vocab=numbered(BERT_WORDS), model_max_length=length)


def bert_text(hidden: int = 16, *, length: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=len(BERT_WORDS),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
    )
    return fill(transformers.BertModel(config))
