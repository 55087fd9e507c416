"""Text for retraining, once as it is and once in WikiText's spelling: `` well @-@ known , and so on . ``

    python examples/wikitext_style.py wikipedia.txt.gz both.txt.gz

WikiText sets punctuation off by spaces, marks what was joined (``1 @,@ 000``), and begins and ends its rows with a
space. A model that is retrained on plain text alone recovers less on such text than its loss on plain text shows, and
perplexity on WikiText measures that too. No text of WikiText is used here.

The last articles are written once, as they are: windows held back from the end of the file have not been seen in
another spelling.
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path

_ARTICLES = "\n\n\n"
_RULES = [
    (re.compile(r"(?<=\d)([.,])(?=\d)"), r" @\1@ "),
    (re.compile(r"(?<=\w)-(?=\w)"), " @-@ "),
    (re.compile(r"([,;:?!()\[\]\"%$/]|\.\.\.)(?!@)(?<!@.)"), r" \1 "),
    (re.compile(r"(?<=\w)('(?:s|m|d|re|ve|ll|t)?\b)", re.IGNORECASE), r" \1"),
    # A sentence's end, and not the full stop of an initial (J. Smith) or an abbreviation with stops in it (U.S.).
    (re.compile(r"(?<=[^\s.][^\s.])\.(?=$|\s+[\"(]?\s*[A-Z0-9])|\.(?=\s*$)"), " . "),
]


def wikitext_row(paragraph: str) -> str:
    """A paragraph as a row of WikiText, with its line break."""
    for pattern, replacement in _RULES:
        paragraph = pattern.sub(replacement, paragraph)
    return f" {' '.join(paragraph.split())} \n"


def wikitext_article(article: str) -> str:
    """An article as :func:`flash_llm.evaluate.load_text` gives WikiText's: rows joined by two line breaks."""
    return "\n\n".join(wikitext_row(paragraph) for paragraph in article.split("\n") if paragraph.strip())


def both(text: str, apart: int) -> str:
    """All articles but the last ``apart`` in WikiText's spelling, then all of them as they are."""
    articles = [article for article in text.split(_ARTICLES) if article.strip()]
    if len(articles) <= apart:
        raise SystemExit(
            f"The text has {len(articles)} articles, between two blank lines each: --apart {apart} is all."
        )
    return _ARTICLES.join([wikitext_article(article) for article in articles[: len(articles) - apart]] + articles)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="articles with two blank lines between them, .txt.gz")
    parser.add_argument("out", type=Path, help="file to write, .txt.gz")
    parser.add_argument("--apart", type=int, default=20, help="articles at the end that are written once")
    options = parser.parse_args()
    with gzip.open(options.text, "rt", encoding="utf-8") as file:
        text = both(file.read(), options.apart)
    with gzip.open(options.out, "wt", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
