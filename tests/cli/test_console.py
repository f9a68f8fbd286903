"""What commands print names files, in which brackets and colons are no markup."""

from headwater.cli.console import err_console, out_console, table


def test_names_are_printed_as_they_are(capsys):
    for console in (out_console(), err_console()):
        console.print("data[v2]/:smile:[/old]")
        console.print(table(["a[v2]", "[/b]"], [["[bold]", ":x:"]]))
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        for name in ("data[v2]/:smile:[/old]", "a[v2]", "[/b]", "[bold]", ":x:"):
            assert name in text
