"""The frozen text encoder: one CLIP text model (SD 1 and 2), or two side by side (SDXL).

Shape suffixes: B prompts, T text tokens, D text width, P pooled text width.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from models.ldm.files import (
    ModelFilesError,
    check_vocabulary,
    has_second_text_encoder,
    load_component,
    load_weights,
)

_NUM_BYTE_TOKENS = 512  # of any byte-level vocabulary: each byte, alone and as the end of a word
# A tokenizer keeps the settings of its last call. Not the encoder's own: it is copied and pickled.
_TOKENIZING = threading.Lock()
os.register_at_fork(  # in the middle of a call, a child would wait for a thread that it lacks
    before=_TOKENIZING.acquire,
    after_in_parent=_TOKENIZING.release,
    after_in_child=_TOKENIZING.release,
)


class TextEmbedding(NamedTuple):
    """Embeddings of prompts: ``tokens`` (B, T, D) and ``pooled`` (B, P), both float32.

    ``pooled`` is None for a model whose UNet reads tokens alone.
    """

    tokens: Tensor
    pooled: Tensor | None


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    """Switch off transformers' progress bar, which would write into logs."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class TextEncoder(nn.Module):
    """Encodes prompts to the embeddings that the model's own diffusers pipeline makes.

    Args:
        tokenizers: one, or SDXL's two.
        encoders: as many; the last of two has a projection. The first of two loses its last
            layer, which no output depends on.
        zero_empty_prompt: whether the empty prompt's embedding is zeros, not what CLIP gives.

    Attributes:
        num_tokens: T of every prompt, 77 in published models.
        width: D: 768 at SD 1.4, 1024 at SD 2.1, 2048 at SDXL.
        pooled_width: P (SDXL: 1280), None for SD 1 and 2, which have no pooled embedding.

    Raises:
        ModelFilesError: the two take prompts of different lengths.
    """

    def __init__(
        self,
        *,
        tokenizers: Sequence[CLIPTokenizer],
        encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
        zero_empty_prompt: bool = False,
    ) -> None:
        super().__init__()
        assert len(tokenizers) == len(encoders) in (1, 2)
        self.tokenizers = tuple(tokenizers)
        self.encoders = nn.ModuleList(encoders)
        self.width = sum(int(encoder.config.hidden_size) for encoder in encoders)
        last = encoders[-1].config
        self.pooled_width = int(last.projection_dim) if len(encoders) == 2 else None
        self.zero_empty_prompt = zero_empty_prompt
        lengths = [  # tokens that a prompt is padded or cut to
            min(int(tokenizer.model_max_length), int(encoder.config.max_position_embeddings))
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        ]
        if len(set(lengths)) > 1:
            raise ModelFilesError(
                f"text_encoder and text_encoder_2 must take prompts of one length, got {lengths} "
                "tokens; look at model_max_length in both tokenizer_config.json"
            )
        self.num_tokens = lengths[0]
        if len(encoders) == 2:  # SDXL reads the first encoder's last hidden state but one
            model = getattr(encoders[0], "text_model", encoders[0])  # transformers 4 wraps it
            model.encoder.layers = model.encoder.layers[:-1]
            model.final_layer_norm = nn.Identity()

    @classmethod
    def from_pretrained(
        cls, folder: Path, *, variant: str | None, dtype: torch.dtype, zero_empty_prompt: bool
    ) -> "TextEncoder":
        """Load the one or two text encoders of a diffusers folder.

        Raises:
            ModelFilesError: a file is missing or damaged, weights are not those that a config
                describes, or a tokenizer has no vocabulary or is not its text encoder's.
        """
        options = {"variant": variant, "dtype": dtype, "ignore_mismatched_sizes": True}
        kinds: dict[str, type[CLIPTextModel | CLIPTextModelWithProjection]] = {"": CLIPTextModel}
        if has_second_text_encoder(folder):
            kinds["_2"] = CLIPTextModelWithProjection
        tokenizers = load_tokenizers(folder)
        with _without_progress_bar():
            encoders = [
                load_weights(kind, folder, f"text_encoder{ending}", **options)
                for ending, kind in kinds.items()
            ]
        for ending, tokenizer, encoder in zip(kinds, tokenizers, encoders, strict=True):
            _check_tokens(tokenizer, encoder, where=f"{folder}/tokenizer{ending}")
        return cls(tokenizers=tokenizers, encoders=encoders, zero_empty_prompt=zero_empty_prompt)

    def forward(self, prompts: Sequence[str]) -> TextEmbedding:
        """Encode prompts; one over T tokens is cut there, as in the model's own pipeline.

        SD 1 and 2 read the last hidden state. SDXL reads both encoders' last but one, side by
        side, and the second's projected embedding of the end of text as the pooled one (Podell et
        al. 2023, section 2.1; diffusers' StableDiffusionXLPipeline.encode_prompt).
        """
        if len(self.encoders) == 1:
            output = self.encoders[0](self._tokenize(prompts, 0))
            return TextEmbedding(output.last_hidden_state.float(), None)
        outputs = [
            encoder(self._tokenize(prompts, i), output_hidden_states=i == 1)
            for i, encoder in enumerate(self.encoders)
        ]
        last_but_one = [outputs[0].last_hidden_state, outputs[1].hidden_states[-2]]
        tokens = torch.cat(last_but_one, dim=-1).float()
        pooled = outputs[1].text_embeds.float()
        if self.zero_empty_prompt:
            empty = _copy_ahead(torch.tensor([not prompt for prompt in prompts]), tokens.device)
            tokens = tokens.masked_fill(empty[:, None, None], 0.0)
            pooled = pooled.masked_fill(empty[:, None], 0.0)
        return TextEmbedding(tokens, pooled)

    def find_cut(self, prompts: Sequence[str]) -> set[str]:
        """Return the prompts that ``forward`` cuts, since a tokenizer makes over T tokens of them.

        What follows in such a prompt is not read. Threads may call it beside ``forward``.
        """
        return find_cut(prompts, self.tokenizers, self.num_tokens)

    def _tokenize(self, prompts: Sequence[str], number: int) -> Tensor:
        with _TOKENIZING:
            tokens = self.tokenizers[number](
                list(prompts),
                padding="max_length",
                max_length=self.num_tokens,
                truncation=True,
                return_tensors="pt",
            )
        return _copy_ahead(tokens.input_ids, next(self.parameters()).device)


def load_tokenizers(folder: Path) -> list[CLIPTokenizer]:
    """Load the one or two tokenizers of a diffusers folder; ModelFilesError if one is not whole."""
    endings = ("", "_2") if has_second_text_encoder(folder) else ("",)
    for ending in endings:  # first: it costs nothing
        check_vocabulary(folder / f"tokenizer{ending}")
    return [load_component(CLIPTokenizer, folder, f"tokenizer{ending}") for ending in endings]


def find_cut(
    prompts: Sequence[str], tokenizers: Sequence[CLIPTokenizer], num_tokens: int
) -> set[str]:
    """Return the prompts of which a tokenizer makes over ``num_tokens`` tokens."""
    # A token is of one byte at least, and start and end are two; only ASCII keeps its bytes when a
    # tokenizer brings text into its normal form.
    long = [x for x in prompts if not (x.isascii() and len(x) <= num_tokens - 2)]
    found: set[str] = set()
    for tokenizer in tokenizers if long else ():
        with _TOKENIZING:
            tokens = tokenizer(long, verbose=False)["input_ids"]
        found.update(x for x, ids in zip(long, tokens, strict=True) if len(ids) > num_tokens)
    return found


def _copy_ahead(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to a device without waiting for its running work, as a copy of pageable memory would."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _check_tokens(
    tokenizer: CLIPTokenizer, encoder: CLIPTextModel | CLIPTextModelWithProjection, *, where: str
) -> None:
    """Check that start, end and padding have embeddings, and that the vocabulary is not empty."""
    if len(tokenizer) < _NUM_BYTE_TOKENS:
        raise ModelFilesError(
            f"{where}: expected a vocabulary of at least {_NUM_BYTE_TOKENS} tokens, got "
            f"{len(tokenizer)}; fetch the folder again"
        )
    num = int(encoder.config.vocab_size)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if any(number is None or not 0 <= number < num for number in ids):
        raise ModelFilesError(
            f"{where}: the start, end and padding of text must be tokens below {num}, the text "
            f"encoder's vocab_size, got {ids}; tokenizer and text encoder must be of one model: "
            "fetch both again"
        )
