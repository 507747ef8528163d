"""An invoice as PDF: every line and sum is on it, the same bytes each time, and other alphabets with a font."""

import json
import re
import zlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from api import invoice_pdf
from api.invoice_pdf import FontError
from billing import closing, invoices, ledger
from billing.dimensions import Dimensions
from billing.ledger import EntryKind, NewEntry
from billing.money import SCALE
from storage.open import Storage
from tests.factories import NOW, bill, make_account, make_operation, make_run, make_usage


@pytest.fixture
def document(storage: Storage) -> Mapping[str, Any]:
    """Of 40 base models and a payment."""
    with storage.database.begin() as tx:
        account = make_account(tx, "Zoë 东京")
        for place in range(40):
            run = make_run(tx, account, base_model=f"model-{place}", model_seq_id=place)
            used = make_usage(device_ns=(place + 1) * 10**12 + 10**5, tokens_trained=1_234_567)
            bill(tx, run, make_operation(tx, run), used, now=NOW)
        paid = NewEntry(EntryKind.TOP_UP, "topup:1", Dimensions(account.id), -SCALE, note="by wire")
        ledger.append(tx, [paid], now=NOW)
        end = NOW + timedelta(days=1)
        invoice = closing.close(tx, account.id, end=end, now=end)
        assert invoice is not None
        return json.loads(invoices.text(tx, invoice))  # type: ignore[no-any-return]


def texts(content: bytes) -> list[str]:
    """What stands on the pages, in order."""
    streams = [zlib.decompress(found) for found in re.findall(rb"stream\n(x.*?)\nendstream", content, re.DOTALL)]
    shown = [found for stream in streams for found in re.findall(rb"\((.*?)(?<!\\)\) Tj", stream)]
    return [text.decode("latin-1").replace("\\(", "(").replace("\\)", ")") for text in shown]


def test_every_amount_is_on_it(document: Mapping[str, Any]) -> None:
    # When
    content = invoice_pdf.render(document)
    shown = texts(content)
    # Then
    assert content.startswith(b"%PDF-")
    assert [line["amount"] for line in document["lines"] if line["amount"] not in shown] == []
    assert f"{document['subtotal']} USD" in shown
    assert shown.count(f"{float(document['total']):.2f} USD") >= 2
    assert "1,234,567 trained" in shown
    assert any(text.startswith("Zoë ??") for text in shown)
    assert [text for text in shown if "page" in text][-1].startswith("Invoice 1, page ")


def test_the_same_document_gives_the_same_bytes(document: Mapping[str, Any]) -> None:
    assert invoice_pdf.render(document) == invoice_pdf.render(document)


def test_a_font_that_is_none_is_named(document: Mapping[str, Any], tmp_path: Path) -> None:
    font = tmp_path / "font.ttf"
    for content in (None, b"no font"):
        if content is not None:
            font.write_bytes(content)
        with pytest.raises(FontError, match=r"PIECEWORK_INVOICE_FONT: .*font\.ttf"):
            invoice_pdf.render(document, font=font)


def test_a_font_brings_its_letters(document: Mapping[str, Any]) -> None:
    font = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    content = invoice_pdf.render({**document, "account": {"id": "a", "name": "Зоя"}}, font=font)
    assert b"DejaVuSans" in content
    assert not [text for text in texts(content) if "?" in text]
