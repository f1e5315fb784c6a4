"""What single pipelines need beside the rules: one table, as small as the rules allow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from truestep.errors import UsageError
from truestep.testing.tiny.facts import Facts
from truestep.testing.tiny.unets import CROSS_FIRST, IF_UNET, KANDINSKY2_UNET, KANDINSKY22_UNET

Settings = dict[str, Any]


@dataclass(frozen=True)
class Use:
    """A component of another class than the annotation says.

    Args:
        cls: The class's name in diffusers or transformers.
        settings: Arguments of its configuration beside the table's.
    """

    cls: str
    settings: Settings | None = None


Change = Use | Settings | Callable[[Facts], Settings] | None | bool | float | str | tuple[int, ...]
"""A component of another class; arguments of its configuration; none; or a plain argument."""


def _beside(f: Facts) -> Settings:
    """Another latent beside the noisy one."""
    return {"in_channels": 2 * f.latent}


def _masked(f: Facts) -> Settings:
    """A masked latent and its mask beside the noisy one."""
    return {"in_channels": 2 * f.latent + 1}


def _packed_beside(f: Facts) -> Settings:
    return {"in_channels": 8 * f.latent, "out_channels": 4 * f.latent}


def _first_frame(f: Facts) -> Settings:
    """Wan's image to video: the encoded frames and four channels of mask."""
    return {"in_channels": 2 * f.latent + 4, "image_dim": f.text}


_DEEP_VAE = {"dim_mult": [1] * 6, "temperal_downsample": [False] * 5, "base_dim": 4}
"""Edits are computed at a fixed area of a megapixel: an autoencoder that reduces 32-fold."""

_SIXTEENFOLD = {
    "dim_mult": [1] * 5,
    "temperal_downsample": [False, False, False, True],
    "scale_factor_spatial": 16,
}
"""A picture's slot among the tokens of a text stands for two by two of its latents: 32 pixels."""

_EIGHTFOLD = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
"""For pipelines that divide sizes by 8 themselves."""

_IF_LARGER = {**IF_UNET, "in_channels": 6, "class_embed_type": "timestep"}
_DEEP_KL = {
    "block_out_channels": (4,) * 6,
    "down_block_types": ("DownEncoderBlock2D",) * 6,
    "up_block_types": ("UpDecoderBlock2D",) * 6,
    "latent_channels": 16,
}
_MONO = {"in_channels": 1, "out_channels": 1}
_TWO_IMAGES = {"in_channels": 8, "out_channels": 4}
_SOUND_UNET = {
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 32,
    "class_embeddings_concat": True,
    "cross_attention_dim": (8, 16),
}
"""Sound is conditioned by a class embedding; attention looks at the sound itself."""

_T5_BESIDE: dict[str, Change] = {
    "vae": _EIGHTFOLD,
    "text_encoder_2": Use("T5EncoderModel"),
    "tokenizer_2": Use("T5Tokenizer"),
}
_SIXTEEN = {"latent_channels": 16}
_CLIP_IMAGE: dict[str, Change] = {
    "image_encoder": Use("CLIPVisionModel"),
    "image_processor": Use("CLIPImageProcessorPil"),
}

_DEEP_WAN = {
    "dim_mult": [1] * 6,
    "temperal_downsample": [False, False, False, True, True],
    "scale_factor_spatial": 32,
}
_COSMOS3: dict[str, Change] = {"text_tokenizer": Use("Qwen2Tokenizer")}
_LAYERS_36 = {"text_config": {"num_hidden_layers": 36}}
"""Layers of a language model that a pipeline names by number."""

_KREA2: dict[str, Change] = {
    "text_encoder": _LAYERS_36,
    "transformer": {"num_text_layers": 12},
}
_FILLED: dict[str, Change] = {
    "transformer": lambda f: {
        "in_channels": 4 * (2 * f.latent + 4),
        "out_channels": 4 * f.latent,
    }
}
"""Flux beside a masked picture: its latent, and a mask of 8 by 8 pixels for each latent pixel."""
_AMUSED: dict[str, Change] = {
    "scheduler": {"mask_token_id": 31},
    "vqvae": {"lookup_from_codebook": True},
}

EXCEPTIONS: dict[str, dict[str, Change]] = {
    "AltDiffusionPipeline": {"text_encoder": {"project_dim": 32}},
    "AltDiffusionImg2ImgPipeline": {"text_encoder": {"project_dim": 32}},
    "AmusedPipeline": _AMUSED,
    "AmusedImg2ImgPipeline": _AMUSED,
    "AmusedInpaintPipeline": _AMUSED,
    "AudioLDMPipeline": {"vae": _MONO, "unet": _SOUND_UNET},
    "AudioLDM2Pipeline": {"vae": _MONO},
    "MusicLDMPipeline": {"text_encoder": Use("ClapModel"), "vae": _MONO, "unet": _SOUND_UNET},
    "BriaFibo2Pipeline": {"text_encoder": _LAYERS_36},
    "CogVideoXFunControlPipeline": {"transformer": _beside},
    "CogVideoXImageToVideoPipeline": {
        "transformer": lambda f: {
            **_beside(f),
            "use_rotary_positional_embeddings": True,
            "use_learned_positional_embeddings": True,
        }
    },
    "CogView4ControlPipeline": {"transformer": _beside},
    "Cosmos2TextToImagePipeline": {"scheduler": {"use_karras_sigmas": True}},
    "Cosmos2VideoToWorldPipeline": {
        "scheduler": {"use_karras_sigmas": True},
        "transformer": lambda f: {"in_channels": f.latent + 1},
    },
    "Cosmos2_5_PredictBasePipeline": {"transformer": lambda f: {"in_channels": f.latent + 1}},
    "Cosmos3OmniPipeline": {
        **_COSMOS3,
        "sound_tokenizer": {},
        "enable_safety_checker": False,
    },
    "CosmosVideoToWorldPipeline": {"transformer": lambda f: {"in_channels": f.latent + 1}},
    "DanceDiffusionPipeline": {"scheduler": Use("IPNDMScheduler")},
    "FluxControlPipeline": {"transformer": _packed_beside},
    "FluxControlImg2ImgPipeline": {"transformer": _packed_beside},
    "FluxControlInpaintPipeline": {"transformer": _packed_beside},
    "FluxFillPipeline": _FILLED,
    "HunyuanDiTPipeline": _T5_BESIDE,
    "HunyuanDiTPAGPipeline": _T5_BESIDE,
    "HunyuanDiTControlNetPipeline": _T5_BESIDE,
    "FluxPriorReduxPipeline": {"image_embedder": {"txt_in_features": 4096}},
    "HeliosPipeline": {"scheduler": {"stage_range": [0, 1], "stages": 1}},
    "HunyuanSkyreelsImageToVideoPipeline": {"transformer": _beside},
    "HunyuanVideoImageToVideoPipeline": {
        "image_processor": Use("CLIPImageProcessorPil"),
        "text_encoder": {"pad_token_id": 3},
        "transformer": lambda f: {**_masked(f), "image_condition_type": "latent_concat"},
    },
    "Ideogram4Pipeline": {"text_encoder": Use("Qwen3VLModel", _LAYERS_36)},
    "Kandinsky5I2IPipeline": {"vae": _EIGHTFOLD},
    "Kandinsky6TI2VAPipeline": {"audio_vae": {}, "vocoder": {}},
    "IFPipeline": {"unet": IF_UNET},
    "IFImg2ImgPipeline": {"unet": IF_UNET},
    "IFInpaintingPipeline": {"unet": IF_UNET},
    "IFSuperResolutionPipeline": {"unet": _IF_LARGER},
    "IFImg2ImgSuperResolutionPipeline": {"unet": _IF_LARGER},
    "IFInpaintingSuperResolutionPipeline": {"unet": _IF_LARGER},
    "KandinskyV22ControlnetPipeline": {
        "unet": {**KANDINSKY22_UNET, "in_channels": 8, "addition_embed_type": "image_hint"}
    },
    "KandinskyV22ControlnetImg2ImgPipeline": {
        "unet": {**KANDINSKY22_UNET, "in_channels": 8, "addition_embed_type": "image_hint"}
    },
    "JoyImageEditPipeline": {"vae": _DEEP_WAN},
    "Krea2Pipeline": {"text_encoder_select_layers": (0, 1, 2)},
    "LDMPipeline": {"unet": lambda f: {"in_channels": f.latent, "out_channels": f.latent}},
    "LDMSuperResolutionPipeline": {
        "unet": {"in_channels": 6},
        "vqvae": {"latent_channels": 3},
    },
    "LDMTextToImagePipeline": {"unet": Use("UNet2DConditionModel"), "vqvae": Use("AutoencoderKL")},
    "LatentConsistencyModelPipeline": {"unet": {"time_cond_proj_dim": 32}},
    "LatentConsistencyModelImg2ImgPipeline": {"unet": {"time_cond_proj_dim": 32}},
    "LongCatImagePipeline": {"vae": _SIXTEEN},
    "LongCatImageEditPipeline": {"vae": _DEEP_KL},
    "LucyEditPipeline": {"transformer": _beside},
    "MarigoldDepthPipeline": {"unet": _TWO_IMAGES},
    "MarigoldNormalsPipeline": {"unet": _TWO_IMAGES},
    "MarigoldIntrinsicsPipeline": {"unet": {"in_channels": 12, "out_channels": 8}},
    "PIAPipeline": {
        "motion_adapter": Use("MotionAdapter", {"conv_in_channels": 9}),
    },
    "PaintByExamplePipeline": {"unet": _masked},
    "QwenImage21Pipeline": {"vae": _SIXTEENFOLD},
    "QwenImageEditPipeline": {"vae": _DEEP_VAE},
    "QwenImageEditInpaintPipeline": {"vae": _DEEP_VAE},
    "QwenImageEditPlusPipeline": {"vae": _DEEP_VAE},
    "QwenImageLayeredPipeline": {"vae": _DEEP_VAE},
    "SanaSprintPipeline": {"scheduler": Use("SCMScheduler")},
    "SanaSprintImg2ImgPipeline": {"scheduler": Use("SCMScheduler")},
    "SanaVideoPipeline": {"vae": Use("AutoencoderKLWan")},
    "SanaImageToVideoPipeline": {"vae": Use("AutoencoderKLWan")},
    "SkyReelsV2ImageToVideoPipeline": {"transformer": _first_frame},
    "StableDiffusion3InpaintPipeline": {"vae": _SIXTEEN},
    "QwenImageControlNetInpaintPipeline": {
        "controlnet": lambda f: {"extra_condition_channels": f.latent}
    },
    "StableDiffusion3ControlNetInpaintingPipeline": {
        "controlnet": {"extra_conditioning_channels": 1}
    },
    "StableDiffusionAdapterPipeline": {"unet": CROSS_FIRST},
    "StableDiffusionDepth2ImgPipeline": {"unet": {"in_channels": 5}},
    "StableDiffusionInstructPix2PixPipeline": {"unet": _beside},
    "StableDiffusionXLInstructPix2PixPipeline": {"unet": _beside},
    "StableDiffusionLDM3DPipeline": {"vae": {"in_channels": 6, "out_channels": 6}},
    "StableDiffusionModelEditingPipeline": {"scheduler": Use("DDIMScheduler")},
    "StableDiffusionParadigmsPipeline": {"scheduler": Use("DDIMParallelScheduler")},
    "StableDiffusionUpscalePipeline": {
        "unet": {"in_channels": 7, "out_channels": 4, "num_class_embeds": 1000}
    },
    "StableVideoDiffusionPipeline": {
        "image_encoder": {"image_size": 224, "patch_size": 56},
        "scheduler": {"prediction_type": "v_prediction", "use_karras_sigmas": True},
    },
    "ZImageControlNetInpaintPipeline": {
        "controlnet": lambda f: {"control_in_dim": 2 * f.latent + 1}
    },
    "Ideogram4AutoBlocks": {"prompt_enhancer_head": None, "text_encoder": _LAYERS_36},
    "Krea2AutoBlocks": _KREA2,
    "Krea2TurboAutoBlocks": _KREA2,
    "HeliosPyramidDistilledAutoBlocks": {"scheduler": Use("HeliosDMDScheduler")},
    "HeliosAutoBlocks": {"scheduler": {"stage_range": [0, 1], "stages": 1}},
    "Cosmos3OmniBlocks": _COSMOS3,
    "Cosmos3DistilledBlocks": _COSMOS3,
    "QwenImage21AutoBlocks": {"vae": _SIXTEENFOLD},
    "QwenImage21TurboAutoBlocks": {"vae": _SIXTEENFOLD},
    "QwenImageEditAutoBlocks": {"vae": _DEEP_VAE},
    "QwenImageEditPlusAutoBlocks": {"vae": _DEEP_VAE},
    "QwenImageLayeredAutoBlocks": {"vae": _DEEP_VAE},
    "Wan22Image2VideoBlocks": {
        "transformer": lambda f: {"in_channels": 2 * f.latent + 4},
        "transformer_2": lambda f: {"in_channels": 2 * f.latent + 4},
    },
    "Wan22VaceBlocks": {"transformer": Use("WanVACETransformer3DModel")},
    "WanImage2VideoAutoBlocks": {"transformer": _first_frame},
    "wan/WanImage2VideoAutoBlocks/flf2v": {
        "transformer": lambda f: {**_first_frame(f), "pos_embed_seq_len": 34}
    },
    "flux/FluxKontextAutoBlocks/image_conditioned": {"vae": _DEEP_KL},
    "VisualClozeGenerationPipeline": {"resolution": 32, **_FILLED},
    "VisualClozePipeline": {"resolution": 32, **_FILLED},
    "WanImageToVideoPipeline": {"transformer": _first_frame, **_CLIP_IMAGE},
}
"""Changes of components, by the pipeline's class and the component's name."""

for _name in ("", "Img2Img", "Inpaint"):
    EXCEPTIONS[f"Kandinsky{_name}Pipeline"] = {"unet": KANDINSKY2_UNET}
    EXCEPTIONS[f"Kandinsky{_name}CombinedPipeline"] = {"unet": KANDINSKY2_UNET}
    EXCEPTIONS[f"KandinskyV22{_name}Pipeline"] = {"unet": KANDINSKY22_UNET}
    EXCEPTIONS[f"KandinskyV22{_name}CombinedPipeline"] = {"unet": KANDINSKY22_UNET}
for _name in ("Kandinsky", "KandinskyV22"):
    for _kind in ("Inpaint", "InpaintCombined"):
        _unet = KANDINSKY2_UNET if _name == "Kandinsky" else KANDINSKY22_UNET
        EXCEPTIONS[f"{_name}{_kind}Pipeline"] = {"unet": {**_unet, "in_channels": 9}}

_GRAPHS = "it runs exported ONNX graphs, not models of torch"
_WORDS = "it makes text, not pictures or sound"
_WRITES = "its prompt upsampler must write JSON, which random weights do not"
_INVERT = "its call needs a picture that its `invert` was given before"
_BEFORE = "its call needs what another pipeline gave before"

OBSTACLES: dict[str, str] = {
    "ChromaInpaintPipeline": "diffusers 0.42.1 asks Chroma's transformer for guidance_embeds",
    "Cosmos2_5_TransferPipeline": "its control net needs torchvision",
    "DiffusionGemmaPipeline": _WORDS,
    "EasyAnimateInpaintPipeline": "diffusers 0.42.1 gives torch.tensor two arguments",
    "EasyAnimateControlPipeline": "diffusers 0.42.1 gives encode_prompt an argument it lacks",
    "Flux2Pipeline": "its PixtralProcessor needs torchvision",
    "Flux2AutoBlocks": "its PixtralProcessor needs torchvision",
    "Flux3AutoBlocks": _WRITES,
    "Flux3DistilledAutoBlocks": _WRITES,
    "I2VGenXLPipeline": "diffusers 0.42.1 asks CLIP for text_model, which transformers 5 lacks",
    "LEditsPPPipelineStableDiffusion": _INVERT,
    "LEditsPPPipelineStableDiffusionXL": _INVERT,
    "LLaDA2Pipeline": _WORDS,
    "LTX2DFRTemporalRefinePipeline": _BEFORE,
    "OmniGenPipeline": "its processor needs torchvision",
    "OnnxStableDiffusionImg2ImgPipeline": _GRAPHS,
    "OnnxStableDiffusionInpaintPipeline": _GRAPHS,
    "OnnxStableDiffusionPipeline": _GRAPHS,
    "OnnxStableDiffusionUpscalePipeline": _GRAPHS,
    "RFD4ProteinaPipeline": "it makes proteins",
    "StableDiffusionDiffEditPipeline": _INVERT,
    "StableDiffusionOnnxPipeline": _GRAPHS,
    "VersatileDiffusionPipeline": "it has no call of its own",
}
"""Why a pipeline, or blocks of one, are not built."""


def refuse_obstacle(name: str) -> None:
    """Refuse a pipeline's class, or blocks, that are known not to be built.

    Raises:
        UsageError: With the reason.
    """
    if name in OBSTACLES:
        raise UsageError(f"no tiny {name}: {OBSTACLES[name]}")
