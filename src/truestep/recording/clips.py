"""Read finished media to compare them: videos, animations, pictures, folders of frames, sounds.

A file is treated as hostile, and what of it cannot be held or compared is said, never dropped.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from truestep.errors import FileFormatError, MissingExtraError
from truestep.magic import what_is
from truestep.reading import reason
from truestep.recording.media import SOUNDS, VIDEOS

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".apng", ".ppm")
_KINDS = (" picture", " video", " sound")
_WEIGHTS = ("*.safetensors", "*.index.json", "model_index.json", "modular_model_index.json")

MOST_BYTES = 4 * 2**30
"""Decoded frames, or samples, of one side: both are held in memory."""

_MOST_PIXELS = 2**27
"""Of one frame: 11,585 x 11,585, four times the area of 4K squared."""

_BLOCK = 2**20


@dataclass(frozen=True)
class Clip:
    """A side of a comparison of media, decoded.

    Attributes:
        path: The file, or the folder of frames.
        what: `video`, `picture`, `frames` (a folder of them) or `sound`.
        frames: RGB at 8 bits `f h w c` uint8; None if it has none.
        digests: Of each frame as the file holds it, at its own depth and layout.
        names: Of the files of a folder of frames.
        fps: Frames a second as the file says; None where it does not.
        sound: Samples `c n` float32, full scale 1; None if it has none.
        sample_rate: Hz.
        sound_digest: Of the samples as the file holds them.
        form: Codec and layout of pixels or samples, in words.
        colour_range: What the file says of it; empty where it says nothing.
        colour_matrix: Likewise.
        sha256: Of the file, or of all files of the folder in their order.
        unseen: What it holds that is not compared.
        broken: Where decoding ended before the file says that it does, and why.
    """

    path: Path
    what: str
    frames: torch.Tensor | None = None
    digests: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    fps: float | None = None
    sound: torch.Tensor | None = None
    sample_rate: int | None = None
    sound_digest: str = ""
    form: str = ""
    colour_range: str = ""
    colour_matrix: str = ""
    sha256: str = ""
    unseen: tuple[str, ...] = ()
    broken: str = ""

    @property
    def count(self) -> int:
        """Number of frames."""
        return 0 if self.frames is None else len(self.frames)

    @property
    def layouts(self) -> set[str]:
        """Layouts of pixels that the digests are of."""
        return {digest.partition(":")[0] for digest in self.digests}

    def same_frames(self, other: Clip) -> bool:
        """Whether all frames agree bit for bit: as the files hold them, or, where these hold them
        in two layouts, in RGB at 8 bits, if that is all that both hold."""
        if self.frames is None or other.frames is None:
            return False
        if self.layouts == other.layouts or self.unseen or other.unseen:
            return self.digests == other.digests
        return torch.equal(self.frames, other.frames)

    @property
    def seconds(self) -> float | None:
        """Duration: of the frames by their rate, or of a sound."""
        if self.count and self.fps:
            return self.count / self.fps
        if self.sound is not None and self.sample_rate:
            return self.sound.shape[1] / self.sample_rate
        return None


def is_media(path: object) -> bool:
    """Whether a path is a picture, video or sound, by its name or its content, or a folder that
    holds some and no weights."""
    if not isinstance(path, str | Path):
        return False
    path = Path(path)
    try:
        if path.is_dir():
            weights = any(next(path.glob(kind), None) for kind in _WEIGHTS)
            return not weights and next(media_files(path), None) is not None
        return path.is_file() and is_media_file(path)
    except (OSError, ValueError):
        return False


def is_media_file(path: Path) -> bool:
    """Whether a file is a picture, video or sound, by its name or its content."""
    return path.suffix.lower() in (*PICTURES, *VIDEOS, *SOUNDS) or what_is(path).endswith(_KINDS)


def media_files(folder: Path) -> Iterator[Path]:
    """Media of a folder and the folders in it, in the order of their names; links to folders are
    not followed, and names that begin with a dot are not looked at."""
    for path in sorted(folder.iterdir(), key=_in_order):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if not path.is_symlink():
                yield from media_files(path)
        elif path.is_file() and is_media_file(path):
            yield path


def is_sequence(folder: Path) -> bool:
    """Whether a folder holds the frames of one clip: two or more pictures, no other media, whose
    names differ in one number alone (`frame_0007.png`)."""
    if any(path.is_dir() for path in folder.iterdir()):
        return False
    files = list(media_files(folder))
    if len(files) < 2 or not all(path.suffix.lower() in PICTURES for path in files):
        return False
    parts = [re.split(r"(\d+)", path.name) for path in files]
    if len({len(part) for part in parts}) != 1:
        return False
    columns = list(zip(*parts, strict=True))
    differing = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    return len(differing) == 1 and differing[0] % 2 == 1


def _in_order(path: Path) -> list[Any]:
    """`frame_10` after `frame_9`."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(p), p) if at % 2 and len(p) < 19 else (0, p) for at, p in enumerate(parts)]


def read_clip(path: Path) -> Clip:
    """Decode a file, or a folder of frames.

    Raises:
        FileFormatError: It is absent, empty, damaged from its beginning, too large to be held, or
            nothing that is decoded here.
        MissingExtraError: Pillow or PyAV is not installed.
    """
    kind = _kind(path)
    try:
        if not path.exists():
            raise FileNotFoundError("no such file")
        if path.is_file() and not path.stat().st_size:
            raise ValueError("the file is empty")
        if kind == "frames":
            return _folder(path)
        read = _picture if kind == "picture" else _streams
        return replace(read(path), sha256=_sha256([path]))
    except MissingExtraError:
        raise
    except Exception as error:  # a damaged file makes decoders raise almost anything
        raise FileFormatError(
            f"the {kind} cannot be read", where=str(path), measured=_reason(error, path)
        ) from None


def _reason(error: Exception, path: Path) -> str:
    kind = what_is(path) if path.is_file() else ""
    text = getattr(error, "strerror", None) or reason(error)
    text = text.replace(f": '{path}'", "").replace(repr(str(path)), "it")
    if kind.endswith(_KINDS):
        return f"{text}; it begins as {kind}: it is cut short or damaged, perhaps"
    return f"{text}; it is {kind}" if kind else text


def _kind(path: Path) -> str:
    if path.is_dir():
        return "frames"
    content = what_is(path)
    for kind in ("picture", "sound", "video"):
        if content.endswith(f" {kind}"):
            return kind
    suffix = path.suffix.lower()
    kinds = {"picture": PICTURES, "sound": SOUNDS, "video": VIDEOS}
    return next((kind for kind, known in kinds.items() if suffix in known), "file")


def _sha256(paths: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                total.update(block)
    return total.hexdigest()


def _digest(array: np.ndarray[Any, Any], form: str) -> str:
    """Of pixels or samples: of equal ones that are laid out alike it is equal."""
    data = np.ascontiguousarray(array)
    return f"{form}:{data.shape}:{xxhash.xxh3_128_hexdigest(data.tobytes())}"


@dataclass
class _Budget:
    """How much may still be decoded."""

    left: int = field(default_factory=lambda: MOST_BYTES)

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise ValueError(
                f"decoded it is larger than {MOST_BYTES / 2**30:.3g} GiB: compare a part of it"
            )


# --- pictures ------------------------------------------------------------------------------------


def _folder(path: Path) -> Clip:
    files = list(media_files(path))
    budget = _Budget()
    parts = [_picture(file, budget) for file in files]
    sizes = {part.frames.shape[1:] for part in parts if part.frames is not None}
    if len(sizes) > 1 or any(part.count != 1 for part in parts):
        shown = ", ".join(f"{s[1]}x{s[0]}" for s in sorted(sizes)[:4])
        raise ValueError(
            f"its pictures are no frames of one size: {shown}; "
            "as runs they are compared with --runs"
        )
    return Clip(
        path,
        "frames",
        frames=torch.cat([part.frames for part in parts if part.frames is not None]),
        digests=tuple(digest for part in parts for digest in part.digests),
        names=tuple(file.name for file in files),
        form=", ".join(dict.fromkeys(part.form for part in parts)),
        sha256=_sha256(files),
        unseen=tuple(dict.fromkeys(note for part in parts for note in part.unseen)),
    )


def _picture(path: Path, budget: _Budget | None = None) -> Clip:
    """A picture, or all of an animated one, upright and in RGB."""
    try:
        from PIL import Image, ImageOps, ImageSequence
    except ImportError:
        raise MissingExtraError("pillow", "media", "reading pictures") from None
    budget = budget or _Budget()
    frames: list[torch.Tensor] = []
    digests, waits, unseen, broken = [], [], dict[str, None](), ""
    with Image.open(path) as opened:
        form, total = f"{opened.format} {opened.mode}", getattr(opened, "n_frames", 1)
        if opened.width * opened.height > _MOST_PIXELS:
            raise ValueError(f"{opened.width} x {opened.height} pixels are more than is read")
        try:
            for image in ImageSequence.Iterator(opened):
                budget.take(image.width * image.height * 3)
                upright = ImageOps.exif_transpose(image)
                pixels, note, exact = _rgb(upright)
                frames.append(torch.from_numpy(pixels))
                native = pixels if exact else np.asarray(upright)
                digests.append(_digest(native, "rgb24" if exact else upright.mode))
                waits.append(float(image.info.get("duration") or 0))
                unseen |= dict.fromkeys([note] * bool(note))
        except (OSError, EOFError, SyntaxError) as error:
            if not frames:
                raise
            broken = f"frame {len(frames)} of {total}: {_reason(error, path)}"
    seconds = sum(waits) / 1000
    return Clip(
        path,
        "video" if total > 1 else "picture",
        frames=torch.stack(frames),
        digests=tuple(digests),
        fps=len(frames) / seconds if total > 1 and seconds else None,
        form=form,
        unseen=tuple(unseen),
        broken=broken,
    )


def _rgb(image: Any) -> tuple[np.ndarray[Any, Any], str, bool]:
    """Pixels at 8 bits, what of the picture they do not hold, and whether they hold all of it."""
    mode = image.mode
    clear = mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if clear:
        rgba = np.asarray(image.convert("RGBA"))
        opaque = bool((rgba[..., 3] == 255).all())
        note = "" if opaque else "transparency"
        return rgba[..., :3].copy(), note, opaque
    if mode.startswith("I;16") or mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        scale = 1.0 if mode == "F" and np.nanmax(np.abs(values), initial=0.0) <= 1 else 1 / 65535
        grey = np.nan_to_num(values * scale).clip(0, 1) * 255
        return (
            np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2),
            "what is below 8 bits",
            False,
        )
    exact = mode in ("1", "L", "P", "RGB")
    return np.asarray(image.convert("RGB")).copy(), "" if exact else f"{mode} as RGB", exact


# --- videos and sounds ---------------------------------------------------------------------------


def _streams(path: Path) -> Clip:
    """The first video and the first sound of a container, decoded together."""
    try:
        import av
    except ImportError:
        raise MissingExtraError("av", "media", "reading videos and sounds") from None
    with av.open(str(path)) as container:
        pictures, sounds = container.streams.video, container.streams.audio
        chosen = [*pictures[:1], *sounds[:1]]
        if not chosen:
            raise ValueError("it has neither pictures nor sound")
        others = len(container.streams) - len(chosen)
        decoded = _Decoded()
        broken = decoded.all_of(container, chosen)
        stated = pictures[0].frames if pictures else 0
        if pictures and not broken and 0 < decoded.count < stated:
            broken = f"the file says {stated} frames, {decoded.count} can be decoded"
        if decoded.damaged:
            broken = broken or f"{decoded.damaged} frames are damaged"
        rate = (pictures[0].average_rate or pictures[0].guessed_rate) if pictures else None
        form = " and ".join(stream.codec_context.name for stream in chosen)
    if not decoded.frames and not decoded.samples:
        raise ValueError(broken or "nothing of it can be decoded")
    more = [f"{others} other stream{'s' * (others > 1)} of {path.name}"] * bool(others)
    return Clip(
        path,
        "video" if decoded.frames else "sound",
        frames=torch.stack(decoded.frames) if decoded.frames else None,
        digests=tuple(decoded.digests),
        fps=float(rate) if rate and decoded.frames else None,
        sound=torch.from_numpy(np.concatenate(decoded.samples, 1)) if decoded.samples else None,
        sample_rate=decoded.rate or None,
        sound_digest=decoded.sound_digest(),
        form=f"{form} {decoded.form}".strip(),
        colour_range=decoded.colour_range,
        colour_matrix=decoded.colour_matrix,
        unseen=(*more, *decoded.unseen),
        broken=broken,
    )


_EXACT = ("rgb24", "bgr24", "gbrp", "rgb0", "bgr0", "gray", "pal8")
"""Layouts that RGB at 8 bits holds whole."""

_RANGES = {1: "limited range", 2: "full range"}
_MATRICES = {1: "BT.709", 5: "BT.601", 6: "BT.601", 9: "BT.2020"}
"""ISO/IEC 23091-2, as FFmpeg's AVColorRange and AVColorSpace number them."""


class _Decoded:
    """What comes out of a container."""

    def __init__(self) -> None:
        self.frames: list[torch.Tensor] = []
        self.digests: list[str] = []
        self.samples: list[np.ndarray[Any, Any]] = []
        self.unseen: dict[str, None] = {}
        self.form = self.colour_range = self.colour_matrix = ""
        self.rate = self.damaged = 0
        self._sound = xxhash.xxh3_128()
        self._resampler: Any = None
        self._budget = _Budget()

    @property
    def count(self) -> int:
        return len(self.frames)

    def all_of(self, container: Any, streams: Sequence[Any]) -> str:
        """Decode all frames of some streams; what ended it early, if anything did."""
        import av

        try:
            for frame in container.decode(*streams):
                if isinstance(frame, av.VideoFrame):
                    self._picture(frame)
                else:
                    self._sounds(frame)
            if self._resampler is not None:
                self._resampled(None)
        except av.error.FFmpegError as error:
            if not self.frames and not self.samples:
                raise
            text = error.strerror or type(error).__name__
            return f"after {self.count} frames and {self._length} samples: {text}"
        return ""

    @property
    def _length(self) -> int:
        return sum(part.shape[1] for part in self.samples)

    def _picture(self, frame: Any) -> None:
        if frame.width * frame.height > _MOST_PIXELS:
            raise ValueError(f"{frame.width} x {frame.height} pixels are more than is read")
        self._budget.take(frame.width * frame.height * 3)
        if self.frames and tuple(self.frames[0].shape[:2]) != (frame.height, frame.width):
            raise ValueError("its frames change in size")
        self.damaged += bool(frame.is_corrupt)
        pixels = frame.to_ndarray(format="rgb24")
        form = frame.format.name
        self.form = self.form or form
        self.colour_range = self.colour_range or _RANGES.get(int(frame.color_range), "")
        self.colour_matrix = self.colour_matrix or _MATRICES.get(int(frame.colorspace), "")
        if frame.format.components and max(c.bits for c in frame.format.components) > 8:
            self.unseen["what is below 8 bits"] = None
        native = pixels
        if form not in _EXACT:
            try:
                native = frame.to_ndarray()
            except (ValueError, NotImplementedError):
                self.unseen[f"what {form} holds beyond RGB at 8 bits"] = None
        self.digests.append(_digest(native, "rgb24" if form in _EXACT else form))
        self.frames.append(torch.from_numpy(pixels))

    def _sounds(self, frame: Any) -> None:
        import av

        if self._resampler is None:
            self._resampler = av.AudioResampler(format="fltp")
            self.rate = frame.sample_rate
            self.form = f"{self.form} {frame.layout.name}".strip()
            self._sound.update(f"{frame.format.name} {frame.layout.name} {self.rate}".encode())
        self._sound.update(np.ascontiguousarray(frame.to_ndarray()).tobytes())
        self._resampled(frame)

    def _resampled(self, frame: Any) -> None:
        for part in self._resampler.resample(frame):
            array = part.to_ndarray()
            self._budget.take(array.nbytes)
            self.samples.append(array)

    def sound_digest(self) -> str:
        return self._sound.hexdigest() if self.samples else ""
