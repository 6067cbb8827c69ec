"""OTTER's distillation baseline (arXiv 2112.09445, section 4): a moving average of the towers themselves as teacher.

loss = alpha · InfoNCE + (1 - alpha) · KL, both the mean of the image-to-text and the text-to-image direction, where
OTTER's code adds the two up: twice this. KL is from the teacher's targets to softmax(s_d · I · Tᵀ), and s_d a second
learned scale beside InfoNCE's. The teacher's targets are softmax(teacher_scale · S) with, for rows of images,
S = image_weight · v·vᵀ + text_weight · t·tᵀ + v·tᵀ, and for rows of texts its transpose; v and t are the teacher's
embeddings. (The two likenesses within a kind are 1 on the diagonal: a weight of 0 leaves the plain v·tᵀ.)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from torch import nn

from pretrain.config import ConfigError, ModelConfig, PhaseConfig
from pretrain.data.transforms import normalise
from pretrain.losses.contrastive import info_nce, similarity
from pretrain.losses.gather import gather_features
from pretrain.losses.soft_targets import soft_contrastive
from pretrain.modeling.clip import set_context_length, set_image_size
from pretrain.modeling.ema import MovingAverage
from pretrain.objectives.base import Passes
from pretrain.objectives.info_nce import InfoNCE

_MAX_LOG_SCALE = math.log(100)  # of the distillation scale, as in CLIP and in OTTER's code


@dataclass
class DistillationOptions:
    """Options of `distillation`; the defaults are those of OTTER's code."""

    alpha: float = 0.5  # weight of the contrastive loss, 1 - alpha that of the divergence; 1: InfoNCE
    ema_decay: float = 0.999  # limit of the teacher's; see `MovingAverage` for the first steps
    image_weight: float = 1.0  # γv, of the likeness of images among themselves
    text_weight: float = 1.0  # γt, of the likeness of texts among themselves
    teacher_scale: float = 100.0  # the teacher's inverse temperature
    init_temperature: float = 0.0  # of both learned scales at the start; 0: the towers', new or of `model.init`


class Distillation(InfoNCE):
    """`InfoNCE` and a slow copy of the towers whose similarities are further targets.

    The teacher sees the same images and texts, whole: tokens that a phase drops, and cropped positions, are the
    student's only. It is updated after the optimiser's step.

    Raises:
        ConfigError: for an option outside its range.
    """

    # `init_temperature` is of the start: a later phase with other options goes on with what was learned.
    carried = ("model.logit_scale",)

    def __init__(self, model: CustomTextCLIP, config: ModelConfig, options: DistillationOptions | None = None):
        super().__init__(model, config)
        self.options = options or self._default_options()
        self._check_options()
        if self.options.init_temperature:
            with torch.no_grad():
                model.logit_scale.fill_(-math.log(self.options.init_temperature))
        self.teacher = MovingAverage(model, self.options.ema_decay)
        self.distillation_logit_scale = nn.Parameter(model.logit_scale.detach().clone())

    @classmethod
    def passes(cls, options: DistillationOptions) -> Passes:
        """The teacher encodes the pair too."""
        return Passes(teacher_images=1, teacher_texts=1)

    def _default_options(self) -> DistillationOptions:
        return DistillationOptions()

    def _check_options(self) -> None:
        for name in ("alpha", "ema_decay"):
            if not 0 <= (value := getattr(self.options, name)) <= 1:
                raise ConfigError(f"objective.options.{name} is {value}: it must be between 0 and 1")
        for name in ("image_weight", "text_weight"):
            if not 0 <= (value := getattr(self.options, name)) < math.inf:
                raise ConfigError(f"objective.options.{name} is {value}: it must be a number of at least 0")
        temperature, scale = self.options.init_temperature, self.options.teacher_scale
        if temperature and not math.exp(-_MAX_LOG_SCALE) <= temperature <= 1:
            raise ConfigError(
                f"objective.options.init_temperature is {temperature}: it must be between 0.01 and 1, where "
                "it is kept in training, or 0 for the towers' own"
            )
        if not 0 < scale < math.inf:
            raise ConfigError(f"objective.options.teacher_scale is {scale}: it must be above 0 (OTTER's code: 100)")

    def enter_phase(self, phase: PhaseConfig) -> None:
        """Resize student and teacher alike, each from its own positions."""
        super().enter_phase(phase)
        set_image_size(self.teacher.module, phase.image_size)
        set_context_length(self.teacher.module, phase.context_length)

    def encode(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The student's "image" and "text", and the teacher's "teacher_image" and "teacher_text", (B, D) each."""
        teacher = self.teacher.module
        with torch.no_grad():
            image = F.normalize(teacher.visual(normalise(batch["image"])).float(), dim=-1)
            text = F.normalize(teacher.text(batch["tokens"]).float(), dim=-1)
        return {**super().encode(batch), "teacher_image": image, "teacher_text": text}

    def loss(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """InfoNCE's metrics, both losses and the second scale."""
        output = super().loss(features)
        scale = self.distillation_logit_scale.exp()
        with torch.no_grad():
            targets = self.targets(features["teacher_image"], features["teacher_text"])
        divergence = soft_contrastive(
            features["image"], features["text"], scale, *targets, divergence=True, gather=True
        )  # fmt: skip
        alpha, contrastive = self.options.alpha, output["loss"]
        return {
            **output,
            "loss": alpha * contrastive + (1 - alpha) * divergence,
            "contrastive_loss": contrastive.detach(),
            "distillation_loss": divergence.detach(),
            "distillation_scale": scale.detach(),
        }

    def _pair_loss(self, image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return info_nce(image, text, scale, gather=True)

    def targets(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher's embeddings (b, D) say of the batch: (b, B) for images, (b, B) for texts; rows sum to 1."""
        return tuple((self.options.teacher_scale * s).softmax(1) for s in self._similarities(images, texts))

    def _similarities(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(b, B) S of this process's images, and (b, B) Sᵀ of its texts, with the pairs of all processes."""
        all_images, all_texts = gather_features(images), gather_features(texts)
        within = self.options.image_weight * similarity(images, all_images, 1.0)
        within = within + self.options.text_weight * similarity(texts, all_texts, 1.0)
        return within + similarity(images, all_texts, 1.0), within + similarity(texts, all_images, 1.0)

    def after_step(self) -> None:
        """Keep both temperatures in their range, then let the teacher follow."""
        super().after_step()
        with torch.no_grad():
            self.distillation_logit_scale.clamp_(0, _MAX_LOG_SCALE)
        self.teacher.update(self.model)
