"""An invoice as PDF, to be printed or filed: a row per line, then its sums; amounts exact."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from fpdf import FPDF
from fpdf.enums import TableBordersLayout, TableCellFillMode, VAlign
from fpdf.fonts import FontFace

from billing import invoice_document
from billing.ledger import EntryKind
from billing.money import cents_digits, plain

_TITLES = {"invoice": "Invoice", "credit_note": "Credit note"}
_UNITS = {
    "device_s": "device s",
    "gigabyte_months": "GB-months",
    "tokens_trained": "trained",
    "tokens_prefilled": "prefilled",
    "tokens_cached": "cached",
    "tokens_sampled": "sampled",
}
_TRUE_TYPE = (b"\x00\x01\x00\x00", b"true", b"OTTO")  # first bytes of a font file (ISO/IEC 14496-22)
_GRAY = (110, 110, 110)


class FontError(ValueError):
    """The font of the settings cannot be used; the message says why."""


def render(document: Mapping[str, Any], *, font: Path | None = None) -> bytes:
    """The PDF of a document; the same document gives the same bytes.

    Args:
        font: a TrueType font; without one, letters beyond Latin-1 show as `?`.

    Raises:
        FontError: it is none.
    """
    page = _Page(document, font)
    page.head()
    page.lines()
    page.sums()
    return bytes(page.pdf.output())


class _Numbered(FPDF):
    """Says at the foot of every page which one of how many it is."""

    def footer(self) -> None:
        """Called by fpdf2 at the end of a page."""
        self.set_y(-14)
        self.set_font("Helvetica", "", 8)
        self.set_text_color(*_GRAY)
        self.cell(0, 6, f"{self.title}, page {self.page_no()} of {{nb}}", align="R")


class _Page:
    """Writes the parts of a document from top to bottom."""

    def __init__(self, document: Mapping[str, Any], font: Path | None) -> None:
        self._document = document
        self._any_letter = font is not None
        self.pdf = _Numbered(format="A4")
        self.pdf.set_margin(18)
        self.pdf.set_draw_color(200, 200, 200)
        self.pdf.set_auto_page_break(auto=True, margin=20)
        self.pdf.set_creation_date(datetime.fromisoformat(document["issued_at"]))
        self.pdf.set_title(self._title)
        self._family = "Helvetica"
        if font is not None:
            _check_font(font)
            self._family = "given"
            for style in ("", "B"):
                self.pdf.add_font("given", style, font)
        self.pdf.add_page()

    @property
    def _title(self) -> str:
        return f"{_TITLES[self._document['kind']]} {self._document['number']}"

    def head(self) -> None:
        """Number, account, period."""
        document = self._document
        self._font(20, "B")
        self._line(self._title, height=12)
        self._font(10)
        period = " to ".join(_day(document["period"][end]) for end in ("start", "end"))
        facts = [
            ("Account", f"{document['account']['name']} ({document['account']['id']})"),
            ("Period", f"{period} (UTC, end not included)"),
            ("Issued", _day(document["issued_at"])),
            ("Total", self._sum("total")),
        ]
        if document["corrects"] is not None:
            facts.append(("Corrects", f"invoice {document['corrects']}: {document['reason']}"))
        for name, value in facts:
            self.pdf.set_text_color(*_GRAY)
            self.pdf.cell(24, 6, name)
            self.pdf.set_text_color(0, 0, 0)
            self.pdf.multi_cell(0, 6, self._shown(value), new_x="LMARGIN", new_y="NEXT")
        self.pdf.ln(6)

    def lines(self) -> None:
        """The table; its headings are repeated on every page."""
        self._font(9)
        headings = FontFace(emphasis="BOLD", fill_color=(238, 238, 238))
        with self.pdf.table(
            col_widths=(8, 74, 56, 36),
            text_align=("RIGHT", "LEFT", "LEFT", "RIGHT"),
            headings_style=headings,
            borders_layout=TableBordersLayout.HORIZONTAL_LINES,
            cell_fill_mode=TableCellFillMode.NONE,
            line_height=4,
            padding=(1, 1),
            v_align=VAlign.T,
        ) as table:
            table.row(["", "What", "Used", self._document["currency"]])
            for line in self._document["lines"]:
                cells = (str(line["line"]), self._what(line), self._used(line), line["amount"])
                table.row([self._shown(cell) for cell in cells])
        self.pdf.ln(4)

    def sums(self) -> None:
        """Subtotal, rounding, total, and where the account stands."""
        names = {
            "subtotal": "Sum of lines",
            "rounding": "Rounding to whole cents",
            "total": "Total",
            "owed_before": "Owed before",
            "owed_after": "Owed after",
        }
        for name, shown in names.items():
            self._font(11 if name == "total" else 9, "B" if name == "total" else "")
            self.pdf.cell(130, 6, shown, align="R")
            self.pdf.cell(0, 6, self._sum(name), align="R", new_x="LMARGIN", new_y="NEXT")

    def _sum(self, name: str) -> str:
        """One of the document's sums; those in whole cents show their cents."""
        amount, currency = Decimal(self._document[name]), self._document["currency"]
        cents = Decimal(1).scaleb(-cents_digits(currency))
        return f"{amount.quantize(cents) if amount == amount.quantize(cents) else plain(amount)} {currency}"

    def _what(self, line: Mapping[str, Any]) -> str:
        return str(line["description"]) + (f"\nproject {line['project']}" if line["project"] else "")

    def _used(self, line: Mapping[str, Any]) -> str:
        used = invoice_document.quantities(line)
        counts = [f"{number.normalize():,f} {_UNITS[name]}" for name, number in used.items() if number]
        if line["kind"] == EntryKind.CHARGE:
            counts.insert(0, f"{line['entries']:,} x")
        return "\n".join(counts)

    def _line(self, text: str, *, height: float) -> None:
        self.pdf.cell(0, height, self._shown(text), new_x="LMARGIN", new_y="NEXT")

    def _font(self, size: int, style: str = "") -> None:
        self.pdf.set_font(self._family, style, size)

    def _shown(self, text: str) -> str:
        return text if self._any_letter else text.encode("latin-1", "replace").decode("latin-1")


def _day(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M}"


def _check_font(font: Path) -> None:
    try:
        with font.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise FontError(f"PIECEWORK_INVOICE_FONT: {font} cannot be read: {error.strerror}") from error
    if begin not in _TRUE_TYPE:
        raise FontError(f"PIECEWORK_INVOICE_FONT: {font} is no TrueType or OpenType font")
