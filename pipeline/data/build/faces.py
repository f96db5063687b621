"""Crops faces from pictures, as for the paper's face set: found with OpenCV, enlarged by a margin, cropped."""

import functools
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from pipeline.common.errors import DataError, UnavailableError
from pipeline.common.imaging import BadImage, Picture, Pixels, open_image, upright
from pipeline.common.shapes.frame import FILTERS, MODES
from pipeline.data.build.transform import Made, Recipe, Skipped
from pipeline.data.dataset import LabelType
from pipeline.data.sources.interface import Item, printable

DETECT_SIDE = 1024
"""Largest side, in pixels, at which a picture is searched. Crops come from the full picture."""
HAAR = "haarcascade_frontalface_alt2.xml"  # of the frontal cascades the one with the fewest false alarms
Box = tuple[int, int, int]


class FaceRecipe(Recipe):
    """Crops every face of a picture. A picture without faces is skipped, which is not an error."""

    detector: Literal["haar", "yunet"] = "haar"
    model: str = Field("", exclude=True)
    """Path of YuNet's ONNX file. The data set's identity has its content instead: see `model_sha256`."""
    model_sha256: str = ""
    min_face: int = Field(ge=8)
    """Faces with fewer pixels a side are skipped: enlarged, they would be blurred."""
    margin: float = Field(ge=0, le=2)
    """Added to each side, as a share of the face's box."""

    extra_labels: ClassVar[dict[str, LabelType]] = {"face_x": "int", "face_y": "int", "face_side": "int"}

    def make(self, item: Item, picture: Picture) -> list[Made]:
        """Return the faces of a picture, from left to right. Raises BadImage, or Skipped when there is none."""
        if not isinstance(picture, bytes):
            raise BadImage("pixels, where an encoded picture was expected")
        image = upright(open_image(picture), 3)
        boxes = self.find(np.asarray(image))
        kept = sorted(box for box in boxes if box[2] >= self.min_face)
        if not kept:
            largest = max((side for _, _, side in boxes), default=0)
            raise Skipped(f"face of {largest} pixels, below {self.min_face}" if largest else "no face")
        made = []
        for number, box in enumerate(kept):
            pixels = self._crop(image, box)
            key = f"{printable(item.key)}#{number}"
            made.append((key, self._stored(pixels), (*item.labels, *box)))
        return made

    def find(self, rgb: Pixels) -> list[Box]:
        """Return the faces in a picture (H, W, 3) as (left, top, side) in its pixels."""
        import cv2

        scale = min(1.0, DETECT_SIDE / max(rgb.shape[:2]))
        small = (
            rgb
            if scale == 1
            else np.asarray(cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA), np.uint8)
        )
        find = _haar_boxes if self.detector == "haar" else functools.partial(_yunet_boxes, self.model)
        boxes = []
        for left, top, width, height in find(small):
            side = max(width, height) / scale
            x, y = (left + width / 2) / scale - side / 2, (top + height / 2) / scale - side / 2
            boxes.append((round(x), round(y), round(side)))
        return boxes

    def _crop(self, image: Image.Image, box: Box) -> Pixels:
        """Cut a face with its margin as a part that lies inside the picture, and resize it with antialiasing.

        The part has the proportion of the image; its shorter side is that of the face with its margin.
        """
        left, top, side = box
        frame = self.frame
        short = min(frame.width, frame.height)
        across, down = frame.width / short, frame.height / short
        wanted = min(side * (1 + 2 * self.margin), image.width / across, image.height / down)
        wide, high = wanted * across, wanted * down
        x = min(max(left + side / 2 - wide / 2, 0), image.width - wide)
        y = min(max(top + side / 2 - high / 2, 0), image.height - high)
        face = image.resize((frame.width, frame.height), FILTERS[frame.resize], (x, y, x + wide, y + high))
        return np.asarray(face.convert(MODES[self.channels])).reshape(frame.height, frame.width, -1)


def _haar_boxes(rgb: Pixels) -> list[list[float]]:
    import cv2

    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)  # not equalized: that finds more faces, and many false alarms
    found = _haar().detectMultiScale(gray, scaleFactor=1.1, minNeighbors=6, minSize=(24, 24))
    return [[float(value) for value in box] for box in found]


def _yunet_boxes(model: str, rgb: Pixels) -> list[list[float]]:
    import cv2

    detector = _yunet(model)
    detector.setInputSize((rgb.shape[1], rgb.shape[0]))
    _, faces = detector.detect(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    return [] if faces is None else [[float(value) for value in face[:4]] for face in faces]


@functools.cache
def _haar() -> Any:
    """Return this process's Haar detector. It uses one thread, because there is a worker process for every core."""
    try:
        import cv2
    except ImportError:
        raise UnavailableError("faces need opencv-python-headless 4.x: pip install 'dcgan-pipeline[data]'") from None
    cv2.setNumThreads(1)
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    cascade = cv2.CascadeClassifier(folder + HAAR) if hasattr(cv2, "CascadeClassifier") else None
    if cascade is None or cascade.empty():
        raise UnavailableError(f"OpenCV {cv2.__version__} ships no {HAAR}; install opencv-python-headless<5")
    return cascade


@functools.cache
def _yunet(model: str) -> Any:
    import cv2

    cv2.setNumThreads(1)
    try:
        detector = cv2.FaceDetectorYN.create(model, "", (320, 320), score_threshold=0.7)
        detector.detect(np.zeros((320, 320, 3), np.uint8))  # the outputs are looked up only here
        return detector
    except cv2.error as error:
        raise DataError(f"--model {model}: not a YuNet model: {str(error).strip().splitlines()[-1]}") from None
