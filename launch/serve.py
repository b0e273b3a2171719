"""Serve a model over HTTP: OpenAI's chat completions with boxes, the page for browsers, and two labelling tools.

  /v1/chat/completions, /v1/models   OpenAI's API: images as data URLs, streaming, boxes next to the text
  /health                            for monitoring, without the key
  /                                  the page of launch/predict.py --serve
  /label-studio                      machine learning backend of Label Studio
  /x-anylabeling                     remote server of X-AnyLabeling

Questions of several clients are answered together. The key is read from the environment variable COGVLM_API_KEY;
without a key, the server is reachable only from this machine. Needs pip install -e ".[serve]".

Examples:
  python launch/serve.py --model exported
  python launch/serve.py --model exported --adapter shop=adapters/shop --adapter street=adapters/street
  python launch/serve.py --model exported --dtype bf16 --decoding grammar --host 0.0.0.0 --port 8080
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

try:
    from cogvlm_ft.command_line import build_parser, exit_code, fast_imports
    from cogvlm_ft.errors import ConfigError
    from cogvlm_ft.plain_files import real_path
    from cogvlm_ft.settings import DECODINGS, RESIZES
    from cogvlm_ft.terminal import say
except ModuleNotFoundError as error:
    print(f"{error}; activate the environment first: source .venv/bin/activate", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    parser = build_parser(__doc__)
    parser.add_argument(
        "--model", type=Path, required=True, help="model folder, checkpoint, or run (its best checkpoint)"
    )
    parser.add_argument("--name", help="name of the model in requests (default: that of its folder)")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="adapters of launch/export.py --adapter on this model, chosen by NAME in requests; can be repeated",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; any other than this machine needs a key (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any free port (default: 8000)")
    parser.add_argument(
        "--photos", type=Path, help="root of Label Studio's local storage, for tasks that refer to its files"
    )
    parser.add_argument("--wording", help="wording of questions about targets (default: that of the training run)")
    parser.add_argument("--image-size", type=int, help="input resolution in px (default: the model's own)")
    parser.add_argument("--resize", choices=RESIZES, help="as in training (default: that of the model folder)")
    parser.add_argument("--exif", choices=("apply", "ignore"), default="apply", help="as in launch/predict.py")
    parser.add_argument(
        "--decoding", choices=DECODINGS, default="free", help="used if a request does not state it (default: free)"
    )
    parser.add_argument("--zoom", type=float, default=0.0, metavar="PATCHES", help="as in launch/predict.py")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: fp32; bf16 with --weights")
    parser.add_argument(
        "--weights",
        choices=("bf16", "int8", "int4"),
        help="int8, int4: quantise the linear layers while they are read, for small GPUs (default: as --dtype)",
    )
    parser.add_argument(
        "--devices", type=int, default=1, help="number of GPUs over which the layers are split (default: 1)"
    )
    args = parser.parse_args(argv)
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Load the model and serve it."""
    with fast_imports():
        from cogvlm_ft.predict.access import KEY_VARIABLE
        from cogvlm_ft.predict.predictor import Asking, dtype_settings, load_predictor
        from cogvlm_ft.predict.serve import Endpoints, check_installed, check_key, serve
        from cogvlm_ft.predict.served import ServedModels

    check_installed("launch/serve.py")
    key = os.environ.get(KEY_VARIABLE)
    check_key(args.host, key)
    adapters = read_adapters(args.adapter)
    if args.photos is not None and not args.photos.is_dir():
        raise ConfigError(f"--photos {args.photos}: no such folder")
    names = ("image_size", "resize", "decoding", "wording")
    settings = {name: getattr(args, name) for name in names} | dtype_settings(args.dtype, args.weights)
    predictor = load_predictor(args.model, Asking(zoom_patches=args.zoom, num_devices=args.devices, **settings))
    name = args.name or real_path(predictor.weights).name
    served = ServedModels(predictor, name, adapters, upright=args.exif == "apply")
    say(f"models {', '.join(served.names)}, wording {predictor.wording.name}", file=sys.stderr)
    serve(served, host=args.host, port=args.port, endpoints=Endpoints(True, key, args.photos))


def read_adapters(options: list[str]) -> dict[str, Path]:
    """Return the folders by their names, of options NAME=FOLDER."""
    found: dict[str, Path] = {}
    for option in options:
        name, _, folder = option.partition("=")
        if not name or not folder or name in found or "." in name:
            raise ConfigError(f"--adapter {option}: expected NAME=FOLDER, each name once and without dots")
        found[name] = Path(folder).expanduser()
    return found


if __name__ == "__main__":
    sys.exit(main())
