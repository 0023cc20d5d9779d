"""Samples from a work directory: images or clips into one picture; an edited image; or text that continues prompts.

python scripts/sample.py --workdir runs/mnist --labels 0,1,2 --num 8 --cfg 1.5 --top_p 0.96 --out grid.png
python scripts/sample.py --workdir runs/mnist --labels 3 --num 4 --image in.png --box 0.25,0.25,0.75,0.75 --out edited.png
python scripts/sample.py --workdir runs/words --prompt "one red circle" --prompt "no crosses" --num 8 --cfg 2 --out grid.png
python scripts/sample.py --workdir runs/flex --labels 0,1 --option "patch_nums=(1,2,(3,4),(4,6))" --out wide.png
python scripts/sample.py --workdir runs/jpeg --labels 0,1 --out grid.png --files samples/
python scripts/sample.py --workdir runs/avc --labels 0,1 --num 4 --out clips.gif --files samples/    # or a .png, a row a clip
python scripts/sample.py --workdir runs/text --prompt "To be, or" --num 3 --length 200 --out text.txt
"""

import argparse
import ast

import jax
import numpy as np

from jaxgen import cli, pictures
from jaxgen.data import read_image, to_uint8
from jaxgen.data.text import decode_bytes
from jaxgen.decoding.speculate import BROKEN
from jaxgen.generators import box_mask
from jaxgen.hosts import to_host
from jaxgen.recipes.evaluation import sample_outputs
from jaxgen.recipes.sampling import sample_batch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--labels", help="class ids, such as 0,1,2 (images and clips of classes)")
    parser.add_argument("--prompt", action="append", help="a caption, or the text to continue; may be repeated")
    parser.add_argument("--length", type=int, default=200, help="bytes of prompt and continuation (text)")
    parser.add_argument("--num", type=int, default=8, help="samples a label or prompt")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_sampling_flags(parser)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--step", help="a checkpoint's step, or best; the latest if left out")
    parser.add_argument("--scale", type=int, default=1, help="enlarges the picture")
    parser.add_argument(
        "--option",
        nargs="*",
        default=[],
        action="extend",
        metavar="KEY=VALUE",
        help="of the system's own sampler, as Python writes it: depth=4, patch_nums=(1,2,(3,4))",
    )
    parser.add_argument("--image", help="a picture to edit")
    parser.add_argument("--box", help="top,left,bottom,right as shares of the picture; 0.25,0.25,0.75,0.75 if left out")
    parser.add_argument("--outpaint", action="store_true", help="keep the box and make the rest, instead of the reverse")
    cli.add_device_flags(parser)
    parser.add_argument("--out", required=True, help="a .png for the picture, a .gif for clips that move, a .txt for text")
    parser.add_argument("--files", metavar="DIR", help="also writes each sample as the file that it is (JPEG-LM, AVC-LM)")
    parser.add_argument("--npz", help="also saves images [n, H, W, C] or clips [n, f, H, W, C], uint8, with labels or captions")
    args = parser.parse_args()
    if args.num < 1:
        raise ValueError(f"--num {args.num}: must be at least 1")
    if (args.prompt is None) == (args.labels is None):
        raise ValueError("either --labels (of classes) or --prompt (captions, text) has to be given")
    suffixes = (".txt", ".png") if args.prompt else (".png", ".gif")
    check_suffix("--out", args.out, suffixes)
    check_suffix("--npz", args.npz, (".npz",))
    if (args.box or args.outpaint) and not args.image:
        raise ValueError("--box and --outpaint edit a picture: --image is missing")
    step = int(args.step) if args.step and args.step.isdigit() else args.step
    mesh = cli.open_devices(args, every_device=False)
    recipe, params = cli.open_workdir(args.workdir, step=step, mesh=mesh)
    text = recipe.modality == "text"
    if (text or recipe.prompts is not None) != (args.prompt is not None):
        of = f"makes {recipe.modality}{' of captions' if recipe.prompts else '' if text else ' of classes'}"
        raise ValueError(f"--workdir {args.workdir}: {of}; give {'--labels' if args.prompt else '--prompt'}")
    check_suffix("--out", args.out, (".txt",) if text else (".png", ".gif"))
    video = recipe.modality == "video"
    if not video and args.out.endswith(".gif"):
        raise ValueError(f"--out {args.out}: {args.workdir} makes {recipe.modality}, which does not move; expected a .png")
    if video and args.image:
        raise ValueError(f"--image {args.image}: {args.workdir} makes clips, which are not edited")
    try:
        (sample_text if text else sample_images)(args, recipe, params, mesh)
    except TypeError as error:
        unknown = [item for item in args.option if f"unexpected keyword argument '{item.partition('=')[0]}'" in str(error)]
        if not unknown:
            raise
        raise ValueError(f"--option {unknown[0]!r}: the sampler of {args.workdir} has no such option") from error


def check_suffix(flag: str, path: str | None, suffixes: tuple[str, ...]):
    if path and not path.endswith(suffixes):
        raise ValueError(f"{flag} {path}: the name has to end in {' or '.join(suffixes)}")


def options(given: list[str]) -> dict:
    """`KEY=VALUE` as keyword arguments."""
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--option {item!r}: expected KEY=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise ValueError(f"--option {item!r}: {value!r} is no Python number, string or tuple") from None
    return found


def sample_images(args, recipe, params, mesh):
    """A row of pictures a label or caption; of clips a row of frames each, or rows that move."""
    asked = cli.comma_separated(args.labels, "--labels") if recipe.prompts is None else recipe.prompts(args.prompt)
    labels = np.repeat(asked, args.num, axis=0)
    settings = cli.sampling_settings(args, recipe) | options(args.option)
    batch = min(args.batch_size, len(labels))
    if args.image:
        box = cli.comma_separated(args.box or "0.25,0.25,0.75,0.75", "--box", float)
        settings["image"] = read_image(args.image, recipe.config.data)
        settings["keep"] = box_mask(box, outpaint=args.outpaint)
    if args.files and recipe.write is None:
        raise ValueError(f"--files {args.files}: the samples of {args.workdir} are pictures, not files")
    names = (recipe.shows, "tokens", "valid") if recipe.write else (recipe.shows,)
    key = jax.random.key(args.seed)
    out = sample_outputs(recipe, params, key, labels, names=names, batch_size=batch, mesh=mesh, **settings)
    images = out[recipe.shows]
    if jax.process_index():
        return
    if args.files:
        paths = recipe.write(args.files, out["tokens"])
        broken = [path.name for path in paths if path.suffix == ".bin"]
        print(f"{args.files}: {len(paths)} files" + (f", {len(broken)} of them not valid, such as {broken[0]}" if broken else ""))
    with cli.output_file("--out", args.out) as path:
        save_picture(path, args, images)
    if args.npz:
        with cli.output_file("--npz", args.npz) as path:
            said = {"labels": labels} if recipe.prompts is None else {"caption": np.repeat(args.prompt, args.num)}
            np.savez_compressed(path, **{recipe.shows: to_uint8(images)}, **said)
    print(f"{args.out}: {len(images)} samples" + (f", {int(out['valid'].sum())} of them valid files" if "valid" in out else ""))


def save_picture(path, args, images):
    """All samples in one file."""
    if images.ndim == 4:
        return pictures.save_png(path, pictures.grid(images, args.num, scale=args.scale))
    if args.out.endswith(".png"):
        frames = images.reshape(-1, *images.shape[2:])
        return pictures.save_png(path, pictures.grid(frames, images.shape[1], scale=args.scale))
    moments = [pictures.grid(images[:, i], args.num, scale=args.scale) for i in range(images.shape[1])]
    pictures.save_gif(path, np.stack(moments))


def sample_text(args, recipe, params, mesh):
    """All continuations of all prompts, with a line between."""
    prompts = [prompt for prompt in args.prompt for _ in range(args.num)]
    settings = cli.sampling_settings(args, recipe)
    del settings["cfg"]
    settings |= {"length": args.length, **options(args.option)}
    out = to_host(sample_batch(recipe, params, jax.random.key(args.seed), prompts, mesh=mesh, **settings))
    if jax.process_index():
        return
    texts = decode_bytes(out["tokens"], out["length"])
    with cli.output_file("--out", args.out) as path:
        path.write_text(("\n" + "-" * 40 + "\n").join(texts) + "\n")
    made = int(out["length"].sum()) - sum(len(prompt.encode()) for prompt in prompts)
    broken = int((out["status"] == BROKEN).sum())
    print(f"{args.out}: {len(texts)} samples, {made} tokens in {int(out['row_calls'].sum())} calls of the model a row")
    if broken:
        print(f"{broken} samples ended early: the model's logits were not numbers")


if __name__ == "__main__":
    cli.run(main)
