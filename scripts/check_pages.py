"""Open every page of the documentation in a headless Chromium, and report what a reader would stumble over.

    python scripts/check_pages.py                      # builds the site first; exits with 1 where something is wrong
    python scripts/check_pages.py --pictures FOLDER    # and keeps a picture of every page, light and dark

Every page is opened as wide as a telephone and as wide as a desk. Reported are text, code, equations and pictures that
are cut off, pages that scroll sideways, errors of the console, and requests that fail or leave this machine.

Run it with an interpreter that has the extra `docs`. Playwright comes into a temporary environment. The browser is one
that is installed; where there is none, Playwright downloads one, or else Debian's package is installed.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = (390, 1440)
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")

# What scrolls by itself may hold what is wider. Everything else must lie within the column of the article, and nothing
# may be wider than a box that hides what lies outside. Drawings are measured in the pages that hold them as pictures.
LOOK = """
() => {
  const found = [], root = document.documentElement, column = document.querySelector(".md-content")
  if (root.scrollWidth > root.clientWidth) found.push(`the page scrolls sideways: ${root.scrollWidth} px wide`)
  if (!column) return [...found, "there is no article"]
  const edge = column.getBoundingClientRect().right
  const name = e => `${e.tagName.toLowerCase()} "${e.textContent.trim().replace(/\\s+/g, " ").slice(0, 60)}"`
  const visit = e => {
    const box = e.getBoundingClientRect(), overflow = getComputedStyle(e).overflowX
    if (!box.width || !box.height) return
    if (box.right > edge + 1) found.push(`${Math.round(box.right - edge)} px beyond the column: ${name(e)}`)
    else if (["hidden", "clip"].includes(overflow) && e.scrollWidth > e.clientWidth + 1)
      found.push(`${e.scrollWidth - e.clientWidth} px cut off: ${name(e)}`)
    else if (!["auto", "scroll"].includes(overflow)) [...e.children].forEach(visit)
  }
  visit(column)
  for (const picture of column.querySelectorAll("img"))
    if (!picture.naturalWidth) found.push(`a picture that does not load: ${picture.src}`)
  return found
}
"""


def install_browser(python: Path) -> str:
    """The path of a browser, or nothing where Playwright has downloaded its own."""
    playwright = [python, "-m", "playwright", "install", "--with-deps", "chromium-headless-shell"]
    debian = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", "chromium-headless-shell"]
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    if subprocess.run(playwright, check=False).returncode == 0:
        return ""
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(debian, check=False)
    if found := shutil.which("chromium-headless-shell"):
        return found
    raise SystemExit(f"No browser: none of {', '.join(BROWSERS)} is on the path, and none could be installed.")


def serve(site: Path) -> http.server.ThreadingHTTPServer:
    """The site at a free port of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def open_page(context: Any, home: str, name: str, picture: Path | None) -> list[str]:
    """What is wrong with one page."""
    page, found = context.new_page(), []

    def request(asked: Any) -> None:
        if not asked.url.startswith((home, "data:", "blob:")):
            found.append(f"a request to elsewhere: {asked.url}")

    page.on("console", lambda message: message.type == "error" and found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"script: {error}"))
    page.on("requestfailed", lambda asked: found.append(f"a request that fails: {asked.url} {asked.failure}"))
    page.on("request", request)
    page.goto(home + name, wait_until="networkidle")
    found += page.evaluate(LOOK)
    if picture:
        page.screenshot(path=picture, full_page=True)
    page.close()
    return found


def look(site: Path, browser: str, pictures: Path | None) -> int:
    """Open all pages, print what is wrong, and return how much that is."""
    from playwright.sync_api import sync_playwright

    server, wrong = serve(site), 0
    home = f"http://127.0.0.1:{server.server_port}/"
    names = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to run as root with one
        chromium = playwright.chromium.launch(executable_path=browser or None, args=sandbox)
        print(f"Chromium {chromium.version}: {len(names)} pages, {' and '.join(map(str, WIDTHS))} px wide", flush=True)
        for width in WIDTHS:
            for scheme in ("light", "dark") if pictures else ("light",):
                context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
                for name in names:
                    stem = name.removesuffix(".html").replace("/", "-")
                    picture = pictures and pictures / f"{stem}-{width}-{scheme}.png"
                    found = open_page(context, home, name, picture)
                    wrong += len(found)
                    print("".join(f"{name}, {width} px: {line}\n" for line in found), end="", flush=True)
                context.close()
        chromium.close()
    server.shutdown()
    print(f"{wrong} things are wrong" if wrong else "nothing is wrong")
    return wrong


def main() -> int:
    """Build the site, make the environment, and look from inside of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="keep a picture of every page")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="a site that is built already")
    parser.add_argument("--inside", metavar="BROWSER", help=argparse.SUPPRESS)  # this script, in the environment
    options = parser.parse_args()
    if options.inside is not None:
        return 1 if look(options.site, options.inside, options.pictures) else 0
    with tempfile.TemporaryDirectory() as folder:
        site, python = options.site or Path(folder, "site"), Path(folder, "venv", "bin", "python")
        if not options.site:
            build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
            subprocess.run(build, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True)
        venv.create(python.parents[1], with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "playwright"], check=True)
        inside = [python, __file__, "--site", site, "--inside", install_browser(python)]
        if options.pictures:
            options.pictures.mkdir(parents=True, exist_ok=True)
            inside += ["--pictures", options.pictures]
        return subprocess.run(inside, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
