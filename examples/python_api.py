"""sjd2 from Python: the same prompts under AR and under faster decoders, compared and saved.

python examples/python_api.py [FOLDER]      some 15 seconds on a CPU; images go to FOLDER (images/ by default)
"""

import sys

import sjd2

PROMPTS = [
    "a large red circle above a small blue square on a plain teal background",
    "two large green triangles on a plain gray background",
]


def main(folder: str) -> None:
    """Generate the prompts with AR and a faster decoder, and save images below `folder`."""
    print(f"sjd2 {sjd2.__version__}: models {', '.join(sjd2.list_models())}")
    model = sjd2.load("tiny")  # on a GPU: sjd2.load("lumina", device="cuda")
    ar = sjd2.generate(model, PROMPTS, decoder="ar")
    print(ar)

    fast = sjd2.generate(model, PROMPTS, decoder="sjd2")  # with its default settings on this model
    print(fast)
    print(f"{sum(ar.forwards) / sum(fast.forwards):.1f} times fewer forward passes than AR")

    narrow = sjd2.generate(model, PROMPTS, decoder="scd", window=8, guidance_scale=2.0)  # settings by name
    print(narrow)

    fast.save(folder)  # 0000.png, 0001.png, tokens.npy, images.json
    print(f"saved to {folder}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "images")
