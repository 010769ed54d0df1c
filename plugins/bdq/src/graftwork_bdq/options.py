"""What a user may say about BDQ."""

from __future__ import annotations

from typing import Literal

from graftwork.transform.scheme import QuantizeOptions
from pydantic import Field, model_validator

from graftwork_bdq.diagonal import ROW, Form
from graftwork_bdq.loss import Sign
from graftwork_bdq.rotation import Kind

Init = Literal["energy", "smoothquant", "identity"]
Learn = Literal["none", "block", "token"]
Loss = Literal["mse", "ce", "rce"]

_OF_LEARNING = ("loss", "q", "epochs", "steps", "lr", "clip_lr", "clips", "propagate", "learned_block")
_OF_RCE = ("sign", "delta")


class BdqOptions(QuantizeOptions):
    """Options of BDQ; those of the scheme are the same in every plugin that rounds."""

    scheme: str = Field(
        "W4A4KV4",
        description="bits of weights, activations and KV cache: W4A4KV4, W4A16, W2A4KV16; 16 rounds nothing",
    )
    quantizer: Literal["gptq", "rtn", "none"] = Field(
        "gptq",
        description="how weights are rounded: with error feedback, to nearest, or not at all (another plugin rounds)",
    )
    damp: float = Field(0.01, gt=0, le=1, description="gptq: share of the mean diagonal added to the moments")
    order: Literal["given", "importance"] = Field(
        "given", description="gptq: columns as they stand, or those of large inputs first"
    )
    diag: Form = Field(
        "full", description="scale per input channel: full, a Kronecker product of two (kron), or none"
    )
    init: Init | None = Field(
        None, description="where the scales start: energy (if not set), smoothquant, or identity"
    )
    alpha: float = Field(0.5, ge=0, le=1, description="smoothquant: share of the outliers that weights take")
    rotation: Kind = Field(
        "hadamard",
        description="of each place's input, while the model runs: Hadamard blocks, none, a random orthogonal "
        "matrix, and learned orthogonal blocks, alone or after Hadamard blocks",
    )
    rotation_size: int | None = Field(
        None, ge=2, description="size of the Hadamard blocks; the largest that divides where not set"
    )
    learned_block: int = Field(64, ge=2, description="size of the learned orthogonal blocks")
    learn: Learn = Field(
        "none",
        description="none: closed forms only; block: each layer's output; token: the loss on tokens, through "
        "the whole model",
    )
    loss: Loss | None = Field(
        None, description="mse for block, ce or rce (recursive cross-entropy; if not set) for token"
    )
    sign: Sign = Field("symmetric", description="rce: CE - S, or CE + S as printed, which rewards spreading")
    delta: float = Field(0.5, gt=0, le=1, description="rce: share of the prediction in the logarithm")
    q: Literal["label", "teacher"] = Field(
        "label", description="token: the target is the next token, or what the unchanged model predicts"
    )
    epochs: int = Field(15, ge=1, description="passes over the calibration windows, per block or in all")
    steps: int | None = Field(None, ge=1, description="optimizer steps instead of epochs")
    lr: float = Field(5e-3, gt=0, description="learning rate of scales and rotations; cosine to a thousandth")
    clip_lr: float = Field(5e-2, gt=0, description="learning rate of clip factors")
    clips: bool = Field(True, description="learn the share of each range that is kept")
    propagate: bool = Field(
        False,
        description="block: inputs are those that the changed layers before give, not the unchanged model's",
    )
    exclude_first_token: bool = Field(
        False,
        description="leave the first token of a window, often an outlier, out of the statistics for init",
    )
    loss_term: bool = Field(
        False, description="in training: turn the trainer's cross-entropy into the recursive one"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> BdqOptions:
        given = self.model_fields_set
        if self.diag == "row":
            raise ValueError(ROW)
        if self.diag == "none" and self.init not in (None, "identity"):
            raise ValueError(f"init: {self.init} starts scales, and diag: none has none")
        if self.learn == "none":
            unused = [name for name in _OF_LEARNING if name in given]
            if not self.loss_term:
                unused += [name for name in _OF_RCE if name in given]
            if unused:
                raise ValueError(f"{unused[0]} is for learning; set learn to block or token")
            if "learned" in self.rotation:
                raise ValueError(f"rotation: {self.rotation} is learned; set learn to block or token")
        wanted = {"block": ("mse",), "token": ("ce", "rce")}.get(self.learn, ())
        if self.loss is not None and self.loss not in wanted:
            raise ValueError(f"learn: {self.learn} has the loss {' or '.join(wanted)}, not {self.loss}")
        if self.learn != "token" and self.q != "label":
            raise ValueError("q: teacher is for learn: token")
        if self.learn != "block" and self.propagate:
            raise ValueError("propagate is for learn: block")
        if self.learn != "none" and not self._learnable:
            raise ValueError(
                "nothing would be learned: diag is none, no rotation is learned and clips is off"
            )
        if self.init != "smoothquant" and "alpha" in given:
            raise ValueError("alpha is for init: smoothquant")
        return self

    @property
    def start(self) -> Init:
        """Where the scales start."""
        return self.init or ("identity" if self.diag == "none" else "energy")

    @property
    def learns_rotation(self) -> bool:
        return self.learn != "none" and "learned" in self.rotation

    @property
    def learns_clips(self) -> bool:
        """Whether clip factors are learned; what another plugin rounds has its own."""
        return self.learn != "none" and self.clips and self.quantizer != "none"

    @property
    def hadamard(self) -> bool:
        return self.rotation in ("hadamard", "hadamard+learned")

    @property
    def token_loss(self) -> Loss:
        return self.loss or "rce"

    @property
    def _learnable(self) -> bool:
        rounds = self.weights.rounds or self.activations.rounds
        return self.diag != "none" or self.learns_rotation or (self.learns_clips and rounds)
