#!/usr/bin/env python
"""Draw ddpo_scratch/assets/sprites.png again, from Noto Color Emoji (Debian: fonts-noto-color-emoji).

    python tools/render_sprites.py FONT.ttf OUT.png

The committed sheet was made from version 2.042 of the font; the package never needs the font.
"""
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

EMOJI = ("🐱🐶🐴🐵🐰🦓🕷🐦🐑🦌🐮🐐🦁🐯🐻🦝🦊🐺🦎🪲🐜🦋🐟🦈🐳🐬🐿🐭🐀🐍🐢🐸🐔🦆🪿🐝🐷🦃🪰🦙🐫🦇🦍🦔🦘"  # COMMON_ANIMALS
         "🐼🐨🐧🦉🦜🐙🦀🐌🐘🦒🐞🐊🦩🐹🦢🦂"  # OTHER_ANIMALS
         "🍎🍌🍕🎂☕⚽🚗⛵🚀🏠🌳🌻☂⏰🎸📕")  # OBJECTS


def tile(char, font):
    "64x64 RGBA: drawn at the font's own size, cut to its box, padded to a square, scaled with alpha premultiplied."
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((10, 10), char, font=font, embedded_color=True)
    box = image.getbbox()
    if box is None: sys.exit(f"the font has no picture of {char}")
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.size[0])//2, (side - image.size[1])//2))
    a = np.asarray(square).astype(np.float32)/255
    a[..., :3] *= a[..., 3:]
    a = np.stack([np.asarray(Image.fromarray(a[..., k]).resize((64, 64), Image.LANCZOS)) for k in range(4)], -1).clip(0, 1)
    a[..., :3] = np.where(a[..., 3:] > 1e-3, a[..., :3]/np.maximum(a[..., 3:], 1e-3), 0).clip(0, 1)
    return Image.fromarray((a*255).round().astype("uint8"))


def main(font_file, out):
    font = ImageFont.truetype(font_file, 109)
    sheet = Image.new("RGBA", (11*64, -(-len(EMOJI)//11)*64))
    for i, char in enumerate(EMOJI): sheet.paste(tile(char, font), (i % 11*64, i//11*64))
    sheet.save(out, optimize=True)


if __name__ == "__main__": main(*sys.argv[1:])
