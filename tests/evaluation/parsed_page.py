"""A page as an HTML parser sees it."""

import base64
import io
from html.parser import HTMLParser

from PIL import Image

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Every element once it is closed: (tag, attributes, text, tags around it)."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.open.append((tag, dict(attributes), []))
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        opened, attributes, text = self.open.pop()
        assert opened == tag
        self.elements.append((tag, attributes, "".join(text), [around for around, *_ in self.open]))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def all(self, tag):
        return [(attributes, text) for name, attributes, text, _ in self.elements if name == tag]

    def images(self):
        """(alt, the image), decoded."""
        images = []
        for attributes, _ in self.all("img"):
            kind, encoded = attributes["src"].split(";base64,")
            image = Image.open(io.BytesIO(base64.b64decode(encoded, validate=True)))
            image.load()
            assert kind == f"data:image/{image.format.lower()}"
            images.append((attributes["alt"], image))
        return images
