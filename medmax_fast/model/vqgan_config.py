"""The shape of a VQGAN, as vqgan.yaml and Hugging Face's config.json describe it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class VQConfig:
    """Shape of a VQGAN, in the names of vqgan.yaml."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    z_channels: int = 256
    embed_dim: int = 256
    n_embed: int = 8192
    resolution: int = 512
    in_channels: int = 3
    out_ch: int = 3
    double_z: bool = False
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0

    # Hugging Face's names for the same facts (its configuration has no out_ch).
    HF_NAMES = {
        "ch": "base_channels",
        "ch_mult": "channel_multiplier",
        "z_channels": "latent_channels",
        "n_embed": "num_embeddings",
        "double_z": "double_latent",
    }

    @classmethod
    def from_yaml(cls, spec: dict) -> "VQConfig":
        """From the parsed vqgan.yaml; KeyError or TypeError where it lacks something."""
        params = spec["model"]["params"]
        values = {**params["ddconfig"], "embed_dim": params["embed_dim"], "n_embed": params["n_embed"]}
        return cls._from(values)

    @classmethod
    def from_hf(cls, spec: dict) -> "VQConfig":
        """From the `vq_config` of a Hugging Face config.json."""
        return cls._from({name: spec.get(cls.HF_NAMES.get(name, name)) for name in cls.__dataclass_fields__})

    @classmethod
    def _from(cls, values: dict) -> "VQConfig":
        kept = {k: v for k, v in values.items() if k in cls.__dataclass_fields__ and v is not None}
        shape: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
        return cls(**shape)

    def to_yaml(self) -> dict:
        """The vqgan.yaml that describes this shape."""
        ddconfig = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        top = {"embed_dim": ddconfig.pop("embed_dim"), "n_embed": ddconfig.pop("n_embed")}
        params = {"ckpt_path": "vqgan.ckpt", "ddconfig": ddconfig, **top, "lossconfig": {"target": "none"}}
        return {"model": {"target": "taming.models.vqgan.VQModel", "params": params}}

    def to_hf(self) -> dict:
        """The `vq_config` of a Hugging Face config.json."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        del values["out_ch"]
        values["attn_resolutions"] = values["attn_resolutions"] or None
        return {self.HF_NAMES.get(k, k): v for k, v in values.items()}

    @property
    def latent_side(self) -> int:
        """Height and width of the grid of codes."""
        return self.resolution // 2 ** (len(self.ch_mult) - 1)
