"""Ask a model about a photo: the answer, its boxes in pixels, and a picture with the boxes drawn.

python launch/predict.py --model exported --image photo.jpg --prompt "红色的车在哪里?" [--out answer.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cogvlm_ft.config import RESIZES
from cogvlm_ft.errors import CheckpointError, ConfigError, DataError


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder, such as launch/export.py writes")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, help="picture to write (default: IMAGE's name with -answer.png, here)")
    parser.add_argument("--image-size", type=int, help="input resolution in px (default: the model's own)")
    parser.add_argument("--resize", choices=RESIZES, help="as in training (default: what the model folder says)")
    parser.add_argument(
        "--exif",
        choices=("apply", "ignore"),
        default="apply",
        help="apply: turn the photo upright as its camera noted, the way viewers show it; boxes are then in pixels of"
        " the upright photo. ignore: take the pixels as stored, the way the reference does (default: apply)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    args = parser.parse_args(argv)
    try:
        predict(args)
    except (CheckpointError, ConfigError, DataError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def predict(args: argparse.Namespace) -> None:
    import torch

    from cogvlm_ft.data.reader import MAX_PIXELS, decode_image
    from cogvlm_ft.data.record import clip_box
    from cogvlm_ft.data.transforms import photo_frame, resize_of
    from cogvlm_ft.evaluate.draw import draw_boxes
    from cogvlm_ft.evaluate.generate import generate_answers
    from cogvlm_ft.grounding.boxes import boxes_from_bins, parse_boxes
    from cogvlm_ft.model import CogVLMTokenizer, load_model, preprocess_image
    from cogvlm_ft.runtime.distributed import device

    if not args.image.is_file():
        raise DataError(f"--image {args.image}: no such file")
    image = decode_image(args.image.read_bytes(), args.image.name, MAX_PIXELS, upright=args.exif == "apply")
    tokenizer = CogVLMTokenizer.from_folder(args.model)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = load_model(args.model, args.image_size, dtype)
    torch.nn.Module.to(model, device())
    size, frame = model.config.image_size, photo_frame(image.size, args.resize or resize_of(model.config))
    pixels = preprocess_image(frame.apply_image(image, size), size)[None].to(device())
    with torch.no_grad():
        [[answer]] = generate_answers(model, tokenizer, pixels, [[args.prompt]], args.max_new_tokens)

    bins = parse_boxes(answer)
    boxes = None
    if bins is not None:
        found = frame.invert_boxes(tuple(box) for box in boxes_from_bins(bins, frame.size_px).tolist())
        boxes = [clip_box(box, image.size) for box in found]
    print(answer)
    for x0, y0, x1, y1 in boxes or []:
        print(f"  box in pixels: {x0:.1f} {y0:.1f} {x1:.1f} {y1:.1f}")
    out = args.out or Path(f"{args.image.stem}-answer.png")
    draw_boxes(image, [()], [boxes], [(args.prompt, answer)]).save(out)
    print(f"drawn: {out}")


if __name__ == "__main__":
    sys.exit(main())
