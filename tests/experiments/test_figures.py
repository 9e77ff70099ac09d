"""Pictures of a study hold all that is drawn into them."""

from __future__ import annotations

from experiments import figures
from experiments.analysis import Study
from experiments.page import PUBLISHED


def test_all_names_are_inside_the_picture() -> None:
    study = Study.read(PUBLISHED)
    changes = {name: figures.in_percent(study, name) for name in ("topk", "relu")}
    drawn = {
        figures.headline_picture(changes): (4, len(figures.LOOKS)),
        figures.features_picture(study.synthetic): (4, 2),
        figures.curves_picture(study.sweep("paper")): (4, 3),
    }
    for picture, (panels, names) in drawn.items():
        picture.draw_without_rendering()
        (legend,) = picture.legends
        assert (len(picture.axes), len(legend.get_texts())) == (panels, names)
        box = legend.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= picture.bbox.x1 and box.y1 <= picture.bbox.y1
