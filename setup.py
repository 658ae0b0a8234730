"Package metadata, read from settings.ini: the one place that names version, requirements and extras."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
paper = cfg["paper_requirements"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    url=cfg["git_url"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["s4s_nb", "s4s_nb.*"]),
    package_data={"s4s_nb": ["data/*.json", "cards/*.json", "cards/*.safetensors", "paper/*.csv", "use/*.json",
                             "py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require={"paper": paper, "dev": paper + cfg["dev_requirements"].split()},
    entry_points={"nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
                  "console_scripts": ["s4s=s4s_nb.use.cli:main"]},
    zip_safe=False,
)
