"""The whole network: an image and a sentence in, logits of the referent's mask out.

B batch, C channels, H W map size, L tokens, S side of the input.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from model.clip import ClipSizes, DenseCLIP
from model.clip_archive import ArchiveError, derive_sizes, read_clip
from model.decoder import Decoder
from model.neck import ImageFeatures, Neck
from model.projector import Projector

if TYPE_CHECKING:
    from utils.config import Config


class Segmenter(nn.Module):
    """CRIS. `model(image, tokens)` gives logits, the same in training and evaluation mode.

    Its parts have fitting widths (see `build_segmenter`); `sizes` are those of the CLIP inside.
    """

    def __init__(
        self, sizes: ClipSizes, backbone: DenseCLIP, neck: Neck, decoder: Decoder, proj: Projector
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.backbone = backbone
        self.neck = neck
        self.decoder = decoder
        self.proj = proj

    def encode_image(self, image: Tensor) -> ImageFeatures:
        """Compute all that needs no sentence.

        Args:
            image: (B, 3, S, S) float, normalised; S a multiple of 32.
        """
        return self.neck.project(*self.backbone.encode_image(image))

    def segment(self, features: ImageFeatures, tokens: Tensor) -> Tensor:
        """Segment one sentence an image; see `ImageFeatures.repeat` for several.

        Args:
            features: of B images.
            tokens: (B, L) int64 ids; id 0 is padding.
        Returns:
            logits (B, 1, S/4, S/4).
        """
        word_feats, sent_feat = self.backbone.encode_text(tokens)
        fused = self.neck(features, sent_feat)
        pixels = self.decoder(fused, word_feats, pad_mask=tokens == 0)
        return self.proj(pixels, sent_feat)

    def forward(self, image: Tensor, tokens: Tensor, image_index: Tensor | None = None) -> Tensor:
        """Segment sentences on images.

        Args:
            image: (B, 3, S, S) float, normalised; (N, 3, S, S) with `image_index`.
            tokens: (B, L) int64 ids; id 0 is padding.
            image_index: (B,) int64, which of N images each sentence is about; None: its own row.
        Returns:
            logits (B, 1, S/4, S/4).
        """
        features = self.encode_image(image)
        if image_index is not None:
            features = features.repeat(image_index)
        return self.segment(features, tokens)


def build_segmenter(cfg: "Config", weights: dict[str, Tensor] | None = None) -> Segmenter:
    """Assemble the model that a config describes, at its initialisation.

    CLIP's sizes come from `TRAIN.clip_arch`, or else from CLIP's weights, and the widths in
    between follow from them.

    Args:
        cfg: its TRAIN section is read.
        weights: CLIP's, by its names; None reads the archive `TRAIN.clip_pretrain`, if named.
    Raises:
        ArchiveError: the archive cannot be used.
        ValueError: there is neither an archive nor a `clip_arch`, or heads do not divide the width.
    """
    train = cfg.TRAIN
    if weights is None and train.clip_pretrain:
        weights = read_clip(train.clip_pretrain)
    if train.clip_arch is not None:
        sizes = ClipSizes(**train.clip_arch.model_dump())
    elif weights is not None:
        sizes = derive_sizes(weights)
    else:
        raise ValueError("TRAIN.clip_pretrain and TRAIN.clip_arch are both null: give one of them")
    vision, channels = sizes.vision_width, train.vis_dim or sizes.transformer_width
    if channels % train.num_head:
        raise ValueError(f"TRAIN.num_head {train.num_head} does not divide the width {channels}")
    fpn_out = train.fpn_out or (channels // 2, channels, 2 * channels)
    decoder_sizes = train.num_layers, channels, train.num_head, train.dim_ffn
    model = Segmenter(
        sizes,
        DenseCLIP(sizes, train.recompute_backbone),
        Neck((8 * vision, 16 * vision, sizes.embed_dim), fpn_out, sizes.embed_dim),
        Decoder(*decoder_sizes, train.dropout, train.recompute_decoder),
        Projector(sizes.embed_dim, channels),
    )
    if weights is not None:
        load_backbone(model.backbone, weights)
    return model


def load_backbone(backbone: DenseCLIP, weights: dict[str, Tensor]) -> None:
    """Copy CLIP's weights in; only CRIS's own `connect` shortcut keeps its initialisation.

    Weights that CLIP keeps in float16 are rounded to what float16 can hold, as released: the
    release builds the backbone in float16 there, fills it, and then casts it to float32.
    """
    own = backbone.state_dict()
    wrong = [key for key, v in weights.items() if key in own and own[key].shape != v.shape]
    if wrong:
        raise ArchiveError(f"CLIP weights contradict each other in the shapes of {wrong}")
    missing, unexpected = backbone.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.startswith("visual.attnpool.connect.")]
    if missing or unexpected:
        raise ArchiveError(f"CLIP weights do not fit: missing {missing}, unexpected {unexpected}")
    backbone.text_projection.data = backbone.text_projection.half().float()
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.half().float()
