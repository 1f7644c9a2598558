"""The report as one self-contained HTML page, made from its Markdown and the template page.html."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape

from common.errors import InputError
from common.files import read_json
from common.images import read_rgb
from common.page import data_uri, template, webp_uri
from common.report import Results, Tables

_MARK = re.compile(r"<!-- (table|frames): (\S+) -->")
_NUMBER = re.compile(r"<!-- = (.*?) -->")


def report_page(
    document: Path, results: Results, tables: Tables, commands: Mapping[str, str]
) -> str:
    """The page of a Markdown document whose slots are filled (common/report.py).

    Figures open large. Tables can be sorted and name the commands that made them: those in the
    results' own files, else those of `commands`, by the name of the file. `<!-- frames: NAME -->`
    becomes the slider of NAME.webp and NAME.json in the results' folder frames/. A link to a file
    becomes the file's path, since a page may be read without the files. Raises InputError if a
    picture or a file of a slider is missing or malformed.
    """
    reader = MarkdownIt("commonmark", renderer_cls=_Renderer).enable("table")
    reader.renderer.sources = _Sources(document, results, tables, commands)
    body = reader.render(document.read_text())
    contents = reader.renderer.contents
    title = next((text for level, _, text in contents if level == "h1"), document.stem)
    return str(
        template().page(
            title=title,
            body=Markup(body),
            contents=[entry for entry in contents if entry[0] in ("h2", "h3")],
        )
    )


class _Recorded:
    """Results that note which files are read."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Any:
        self.names.append(name)
        return self.results[name]


class _Sources:
    """Where a document's figures, sliders and tables come from."""

    def __init__(
        self, document: Path, results: Results, tables: Tables, commands: Mapping[str, str]
    ) -> None:
        self.document, self.results, self.tables = document, results, tables
        self.commands = commands

    def path(self, link: str) -> Path:
        """The file that a relative link of the document points to."""
        return self.document.parent / link.split("#")[0]

    def files_of_table(self, name: str) -> list[str]:
        """The names of the results' files that a table of `TABLES` is made from."""
        recorded = _Recorded(self.results)
        self.tables[name](recorded)
        return recorded.names

    def files_of_slots(self, comments: Iterable[str]) -> list[str]:
        """The names of the results' files that the number slots among these comments use."""
        slots = (_NUMBER.match(comment) for comment in comments)
        words = [word for slot in slots if slot for word in re.findall(r"\w+", slot[1])]
        return [word for word in words if (self.results.folder / f"{word}.json").is_file()]

    def source(self, files: Iterable[str]) -> Markup:
        """The line below a table that names its files and their commands."""
        files = list(dict.fromkeys(files))
        made = [self.results[name].get("command", self.commands.get(name)) for name in files]
        commands = [*dict.fromkeys(filter(None, made))]
        paths = [f"{self.results.folder.name}/{name}.json" for name in files]
        return template().source(paths, commands)

    def film(self, name: str) -> Markup:
        """The slider or the comparison of results/frames/NAME.webp and NAME.json."""
        path = self.results.folder / "frames" / name
        about = read_json(path.with_suffix(".json"))
        try:
            uri = webp_uri(path.with_suffix(".webp").read_bytes())
            count = len(about["values"]) * (2 if about["sides"] else 1)
            return template().film(about | {"uri": uri, "count": count})
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}.json is not a slider's: {error!r}") from None


class _Renderer(RendererHTML):
    """HTML of Markdown tokens; every public method renders the tokens that have its name."""

    sources: _Sources

    def __init__(self, parser: Any = None) -> None:
        super().__init__(parser)
        self.contents: list[tuple[str, str, str]] = []  # (tag, id, text) of each heading
        self._table: str | None = None  # name of the table slot before the next table
        self._source = Markup()  # of the open table
        self._path = ""  # of the file that the open link points to

    def heading_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """A heading with an id, which is listed in the contents."""
        text = "".join(part.content for part in tokens[at + 1].children)
        name = re.sub(r"\W+", "-", text.lower()).strip("-")
        if any(name == other for _, other, _ in self.contents):
            name = f"{name}-{len(self.contents)}"
        tokens[at].attrSet("id", name)
        self.contents.append((tokens[at].tag, name, text))
        return self.renderToken(tokens, at, options, env)

    def image(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """An embedded picture that opens large."""
        image = read_rgb(self.sources.path(str(tokens[at].attrs["src"])))
        height, width = image.shape[-2:]
        return template().picture(data_uri(image), tokens[at].content, width, height)

    def paragraph_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The start of a paragraph, or of a figure where there is one picture and no text."""
        alone = _picture(tokens[at + 1])
        return "<figure>" if alone else self.renderToken(tokens, at, options, env)

    def paragraph_close(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The end of a paragraph, or the caption and the end of a figure."""
        if alone := _picture(tokens[at - 1]):
            return f"<figcaption>{escape(alone.content)}</figcaption></figure>\n"
        return self.renderToken(tokens, at, options, env)

    def link_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The start of a link to a web page or a section; nothing for a link to a file."""
        href = str(tokens[at].attrs["href"])
        if re.match(r"\w+:|#", href):
            return self.renderToken(tokens, at, options, env)
        root = self.sources.results.folder.parent.resolve()
        self._path = self.sources.path(href).resolve().relative_to(root).as_posix()
        return ""

    def link_close(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The end of a link, or the path of the file that it points to."""
        path, self._path = self._path, ""
        return f" <code>{path}</code>" if path else self.renderToken(tokens, at, options, env)

    def html_inline(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """Nothing: comments hold the slots, and other HTML is not used."""
        return ""

    def html_block(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The slider that a comment asks for; nothing for other comments."""
        kind, name = mark.groups() if (mark := _MARK.match(tokens[at].content)) else ("", "")
        if kind == "table":
            self._table = name
        return self.sources.film(name) if kind == "frames" else ""

    def table_open(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """A table, which can be sorted if it shows no pictures."""
        end = next(i for i in range(at, len(tokens)) if tokens[i].type == "table_close")
        cells = [part for token in tokens[at:end] for part in token.children or ()]
        if self._table:
            files = self.sources.files_of_table(self._table)
        else:
            files = self.sources.files_of_slots(part.content for part in cells)
        self._table, self._source = None, self.sources.source(files) if files else Markup()
        kind = "pictures" if any(part.type == "image" for part in cells) else "sortable"
        return f'<figure class="table"><div class="scroll"><table class="{kind}">\n'

    def table_close(self, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
        """The end of a table and the line that says where its numbers come from."""
        return f"</table></div>{self._source}</figure>\n"


def _picture(token: Token) -> Token | None:
    """The picture of a paragraph that holds nothing else, else None."""
    parts = token.children or []
    return parts[0] if len(parts) == 1 and parts[0].type == "image" else None
