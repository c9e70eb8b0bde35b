#!/usr/bin/env python
"""Draw ddpo_scratch/assets/sprites.png again, from Noto Color Emoji.

    python tools/render_sprites.py FONT.ttf OUT.png

The committed sheet was made from version 2.042 of the font (Debian: fonts-noto-color-emoji); the
package never needs the font.
"""

import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# in the order of CONCEPTS: common animals, other animals, objects
EMOJI = (
    "🐱🐶🐴🐵🐰🦓🕷🐦🐑🦌🐮🐐🦁🐯🐻🦝🦊🐺🦎🪲🐜🦋🐟🦈🐳🐬🐿🐭🐀🐍🐢🐸🐔🦆🪿🐝🐷🦃🪰🦙🐫🦇🦍🦔🦘"
    "🐼🐨🐧🦉🦜🐙🦀🐌🐘🦒🐞🐊🦩🐹🦢🦂"
    "🍎🍌🍕🎂☕⚽🚗⛵🚀🏠🌳🌻☂⏰🎸📕"
)
SIDE, COLUMNS = 64, 11


def draw(char, font):
    "Draw an emoji at the font's own size, cut it to its box and pad it to a square."
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((10, 10), char, font=font, embedded_color=True)
    box = image.getbbox()
    if box is None:
        sys.exit(f"the font has no picture of {char}: use Noto Color Emoji 2.042 or newer")
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side))
    square.paste(image, ((side - image.size[0]) // 2, (side - image.size[1]) // 2))
    return square


def shrink(image):
    "Scale to 64 x 64 with alpha premultiplied, or transparent pixels would darken the edges."
    a = np.asarray(image).astype(np.float32) / 255
    a[..., :3] *= a[..., 3:]
    channels = [Image.fromarray(a[..., k]).resize((SIDE, SIDE), Image.LANCZOS) for k in range(4)]
    a = np.stack([np.asarray(channel) for channel in channels], -1).clip(0, 1)
    alpha = a[..., 3:]
    color = np.where(alpha > 1e-3, a[..., :3] / np.maximum(alpha, 1e-3), 0).clip(0, 1)
    return Image.fromarray((np.concatenate([color, alpha], -1) * 255).round().astype("uint8"))


def main(font_file, out):
    "Write the sheet, 11 sprites a row."
    font = ImageFont.truetype(font_file, 109)  # the one size that the font's bitmaps have
    rows = -(-len(EMOJI) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * SIDE, rows * SIDE))
    for i, char in enumerate(EMOJI):
        place = (i % COLUMNS * SIDE, i // COLUMNS * SIDE)
        sheet.paste(shrink(draw(char, font)), place)
    sheet.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
