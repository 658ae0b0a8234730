"Sphinx configuration of the site: `make docs`."
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util.docutils import SphinxDirective

HERE = Path(__file__).resolve().parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE.parent / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

project, author, release = cfg["title"], cfg["author"], cfg["version"]
copyright = cfg["copyright"]
extensions = ["myst_nb", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

# notebooks: stored outputs only, nothing runs
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "attrs_block", "deflist"]
myst_heading_anchors = 3
pygments_style, pygments_dark_style = "friendly", "github-dark"
add_module_names = False
toc_object_entries = False
maximum_signature_line_length = 400 # one argument a line is what the table below it is for

# math: a local MathJax in one file, so that pages render without a network
mathjax = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static/mathjax/tex-svg.js"
html_static_path = ["_static", str(mathjax)]
mathjax_path = mathjax.name
mathjax3_config = {"tex": {"macros": {"E": r"\mathbb{E}"}}, "options": {"enableMenu": False}}

html_theme = "furo"
html_title = f"{cfg['title']} {release}"
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "source_repository": cfg["git_url"], "source_branch": cfg["branch"], "source_directory": "nbs/",
}


class Exported(SphinxDirective):
    "Makes a symbol whose source is shown a target of links, search and index, without rendering anything."
    required_arguments = 2 # module, name

    def run(self):
        module, name = self.arguments
        full = f"{module}.{name}"
        kind = "method" if "." in name else "class" if name[0].isupper() else "function"
        target = nodes.target("", "", ids=[full], names=[full])
        self.state.document.note_explicit_target(target)
        self.env.domains["py"].note_object(full, kind, full, location=target)
        form = "{} (class in {})" if kind == "class" else "{}() (in module {})"
        entry = form.format(name, module)
        return [addnodes.index(entries=[("single", entry, full, "", None)]), target]


def setup(app):
    app.add_directive("exported", Exported)
