"""Files of classes: read as they are meant, or refused with the line."""

import json

import pytest

from datasets.class_file import MAX_CLASSES, read_classes
from datasets.images import DatasetError


def classes_of(tmp_path, text: str, name: str = "classes.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_classes(tmp_path / name)


def test_a_text_file_has_a_line_for_each_value(fields):
    classes = read_classes(fields / "classes.txt")
    assert list(classes.names) == ["grass", "water", "dirt road"]
    assert list(classes.label_ids) == [0, 1, 3] and list(classes.ignored_ids) == [2]
    assert classes.colors[:2] == [(90, 160, 60), (0, 80, 200)]
    assert classes.to_train_ids()[:5].tolist() == [0, 1, 255, 2, 254]


@pytest.mark.parametrize(
    "content",
    [
        [{"name": "grass", "color": [9, 8, 7]}, "ignore", {"name": "dirt road"}],
        {"grass": [9, 8, 7], "ignore": None, "dirt road": None},
        [{"name": "grass", "color": [9, 8, 7]}, {"name": "ignore"}, {"name": "dirt road"}],
    ],
)
def test_a_json_file_has_one_of_several_forms(tmp_path, content):
    classes = classes_of(tmp_path, json.dumps(content), "classes.json")
    assert list(classes.names) == ["grass", "dirt road"]
    assert list(classes.label_ids) == [0, 2] and list(classes.ignored_ids) == [1]
    assert classes.colors[0] == (9, 8, 7)


@pytest.mark.parametrize("name", ["ignore", "ignored", "Unlabeled", "unlabelled", "VOID"])
def test_classes_are_ignored_by_name(tmp_path, name):
    classes = classes_of(tmp_path, f"road\n{name} 0 0 0\nsky\n")
    assert list(classes.names) == ["road", "sky"] and list(classes.ignored_ids) == [1]


def test_a_file_of_windows_is_read(tmp_path):
    """With a byte order mark, and other line ends."""
    for name, text in (("a.txt", "road 1 2 3\r\nsky\r\n"), ("b.json", '["road", "sky"]')):
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
        assert list(read_classes(tmp_path / name).names) == ["road", "sky"]


def test_names_may_hold_spaces_letters_of_any_language_and_numbers(tmp_path):
    classes = classes_of(tmp_path, "traffic light 250 170 30\nWeg Straße\nlane-2\n木 1,2,3\n")
    assert list(classes.names) == ["traffic light", "Weg Straße", "lane-2", "木"]
    assert classes.colors[0] == (250, 170, 30) and classes.colors[3] == (1, 2, 3)


@pytest.mark.parametrize("count", [2, 3, 20, MAX_CLASSES])
def test_classes_without_a_colour_get_a_unique_one(tmp_path, count):
    classes = classes_of(tmp_path, "".join(f"class-{n}\n" for n in range(count)))
    assert len(classes) == count == len(set(classes.colors))
    for color in classes.colors:
        assert len(color) == 3 and all(type(v) is int and 0 <= v <= 255 for v in color)
    assert list(classes.label_ids) == list(range(count))
    assert classes.to_train_ids()[count:255].tolist() == [254] * (255 - count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("road\nsky\nroad\n", "every class needs a unique name, 'road' is not"),
        ("road 1 2 256\nsky\n", "line 1: the colour is .* give three integers from 0 to 255"),
        ("road 1 2 3\n", "has 1 classes: give 2 to 254"),
        ("road\nignore\n", "has 1 classes"),
        ("# road\n\n", "has 0 classes"),
        ("".join(f"c{n}\n" for n in range(255)), "has 255 classes"),
        ("".join(f"c{n}\n" for n in range(250)) + 10 * "void\n", "has 260 classes"),
    ],
)
def test_wrong_text_files(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.txt.*{message}"):
        classes_of(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["road", "sky"', "is not a JSON list of"),
        ("5", "is not a JSON list of"),
        ('"road and sky"', "is not a JSON list of"),
        ("[1, 2]", "is not a JSON list of"),
        ('[["road", [1, 2, 3]]]', "is not a JSON list of"),
        ("[" * 100000, "is not a JSON list of"),
        ("9" * 5000, "is not a JSON list of"),
        ('{"road": 1, "road": 2}', "'road' is there twice"),
        ('{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "'palette' stands beside 'classes'"),
        ('{"names": ["a", "b"], "labels": ["c"]}', "'names' stands beside 'labels'"),
        ('{"x": ["a", "b"]}', "class 1: the colour is"),
        ('{"train": {"images": 5}, "info": {"x": 1}}', "class 1: what is 'images'"),
        ('[{"name": "a", "foo": 5}, {"name": "b", "foo": 3}]', "class 1: what is 'foo'"),
        ('[{"name": "x", "evaluate": false}]', "class 1: what is 'evaluate'"),
        ('[{"name": "x", "label": "y"}, "z"]', "class 1: more than one name, 'label' is one"),
        ('[{"color": [1, 2, 3]}, "sky"]', "class 1: a class needs a name"),
        ('[{"name": null}, "sky"]', "class 1: a class needs a name"),
        ('[{"name": ["a"]}, "sky"]', "class 1: a class needs a name"),
        ('["road", ""]', "class 2: a class needs a name"),
        ('["road", "a\\u0007"]', "class 2: a class needs a name"),
        ('["road", "road"]', "'road' is not"),
        ('["road"]', "has 1 classes"),
        ('[{"name": "a", "id": 3}, {"name": "b"}]', "class 2: 'b' has no value and others have"),
        ('[{"name": "a", "id": 300}, "b"]', "class 1: the value of a is 300: values are 0 to 255"),
        ('[{"name": "a", "id": 5037}, "b"]', "the value of a is 5037: .* ids of a database"),
        ('[{"name": "a", "id": 7.5}, "b"]', "the value of a is 7.5"),
        ('{"road": [7, [1, 2, 3]], "sky": null}', "class 1: the colour is"),
        ('{"road": [1, 2], "sky": null}', r"the colour is \[1, 2\]"),
        ('{"road": [1, 2, 3.5], "sky": null}', r"the colour is \[1, 2, 3.5\]"),
        ('{"road": [1, 2, -3], "sky": null}', r"the colour is \[1, 2, -3\]"),
        ('{"road": [1, 2, true], "sky": null}', r"the colour is \[1, 2, True\]"),
        ('{"road": "red", "sky": null}', "the colour is red"),
        ('{"road": {"r": 1, "g": 2}, "sky": null}', "the colour is"),
    ],
)
def test_wrong_json_files(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.json.*{message}"):
        classes_of(tmp_path, text, "classes.json")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Straße\nWeg\n".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("road\nsky\n".encode("utf-16"))
    (tmp_path / "unmarked.txt").write_bytes("road\nsky\n".encode("utf-16-le"))
    for name in ("latin.txt", "wide.txt", "unmarked.txt"):
        with pytest.raises(DatasetError, match="save it as UTF-8"):
            read_classes(tmp_path / name)
    for name in ("none.txt", "latin.txt", ""):
        with pytest.raises(DatasetError, match=f"{name} cannot be read as a file of classes"):
            read_classes(tmp_path / name)


# Forms of other programs

ROAD, SKY = (128, 64, 128), (70, 130, 180)
COLORS = {"road": ROAD, "traffic light": SKY}


@pytest.mark.parametrize(
    "text",
    [
        "road 128 64 128\ntraffic light 70 130 180\n",
        "road;128;64;128\ntraffic light;70;130;180\n",
        "road: 128 64 128\ntraffic light: 70 130 180\n",
        "name,r,g,b\nroad,128,64,128\ntraffic light,70,130,180\n",
        "Class Name\tR\tG\tB\nroad\t128\t64\t128\ntraffic light\t70\t130\t180\n",
        "r,g,b,name\n128,64,128,road\n70,130,180,traffic light\n",
        "name,b,g,r\nroad,128,64,128\ntraffic light,180,130,70\n",
        'name,color\nroad,"128, 64, 128"\ntraffic light,#4682b4\n',
        "name,description,color\nroad,grey,#804080\ntraffic light,blue,#4682B4\n,,\n",
        "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:70,130,180::\n",  # CVAT
        "128 64 128\troad\n70 130 180\t\ttraffic light\n",  # CamVid
        "road 128 64 128 # where cars are\n#ffff\ntraffic light 70 130 180\n",
    ],
)
def test_colours_in_text(tmp_path, text):
    classes = classes_of(tmp_path, text)
    assert list(classes.label_ids) == [0, 1] and list(classes.colors) == list(COLORS.values())
    assert dict(zip(classes.names, classes.colors, strict=True)) == COLORS
    assert classes.ids_by_color() == {ROAD: 0, SKY: 1}


@pytest.mark.parametrize(
    "text",
    [
        "7 road\n60 traffic light\n",
        "7: road\n60: traffic light\n",
        "7. road\n60. traffic light\n",
        "7) road\n60) traffic light\n",
        "7,road,128,64,128\n60,traffic light,70,130,180\n",
        "id,name\n7,road\n60,traffic light\n",
        "label;value\r\nroad;7\r\ntraffic light;60\r\n",
    ],
)
def test_values_in_text(tmp_path, text):
    classes = classes_of(tmp_path, text)
    assert list(classes.names) == list(COLORS) and list(classes.label_ids) == [7, 60]


@pytest.mark.parametrize(
    "content",
    [
        [{"id": 7, "name": "road"}, {"id": "60", "name": "traffic light"}],
        {"categories": [{"id": 7, "name": "road"}, {"id": 60, "name": "traffic light"}]},  # COCO
        {"7": "road", "60": "traffic light"},
        {"road": 7, "traffic light": 60},
        {"id2label": {"7": "road", "60": "traffic light"}, "label2id": {}},  # Hugging Face
        {"road": {"id": 7}, "traffic light": {"value": 60}},
        {"7": {"name": "road"}, "60": {"name": "traffic light"}},
    ],
)
def test_values_in_json(tmp_path, content):
    """In a text file too."""
    for name in ("classes.json", "classes.txt"):
        classes = classes_of(tmp_path, json.dumps(content, indent=1), name)
        assert list(classes.names) == list(COLORS) and list(classes.label_ids) == [7, 60]


@pytest.mark.parametrize(
    "content",
    [
        {"classes": [{"title": "road", "color": "#804080"}, {"title": "traffic light"}]},
        {
            "labels": [
                {"readable": "Road", "name": "road", "color": ROAD},
                {"name": "traffic light"},
            ]
        },
        [{"name": "road", "r": 128, "g": 64, "b": 128}, "traffic light"],
        {"road": "128 64 128", "traffic light": None},
    ],
)
def test_colours_in_json(tmp_path, content):
    classes = classes_of(tmp_path, json.dumps(content), "classes.json")
    assert list(classes.names) == list(COLORS) and classes.colors[0] == ROAD
    assert classes.label_colors == {0: ROAD}


def test_black_is_a_colour(tmp_path):
    assert classes_of(tmp_path, "road 0 0 0\nsky\n").label_colors == {0: (0, 0, 0)}


def test_names_are_compared_without_signs_to_ignore_them(tmp_path):
    names = ["don't care", "road", "sky", "Un-labeled", "ignore_region"]
    assert list(classes_of(tmp_path, json.dumps(names), "a.json").names) == ["road", "sky"]


def test_labelme_begins_with_ignored_pixels_and_the_background(tmp_path):
    classes = classes_of(tmp_path, "__ignore__\n_background_\ncat\ndog\n")
    assert dict(zip(classes.names, classes.label_ids, strict=True)) == {
        "_background_": 0, "cat": 1, "dog": 2,
    }  # fmt: skip
    assert list(classes.ignored_ids) == [255]


def test_a_header_of_one_word_is_no_class(tmp_path):
    for header in ("name", "Classes:", "label", "class_name"):
        assert list(classes_of(tmp_path, f"{header}\nroad\nsky\n").names) == ["road", "sky"]


def test_several_lines_may_be_ignored(tmp_path):
    classes = classes_of(tmp_path, "0 void\n60 road\n120 sky\n5 Void\n6 ignore 0 0 0\n")
    assert list(classes.label_ids) == [60, 120] and list(classes.ignored_ids) == [0, 5, 6]
    assert classes.label_colors == {6: (0, 0, 0)}
    assert list(classes_of(tmp_path, "void\nroad\nsky\nvoid\n").ignored_ids) == [0, 3]


@pytest.mark.parametrize("text", ["background\n255 object\n", "0 background\n255 object\n"])
def test_255_may_be_a_class(tmp_path, text):
    classes = classes_of(tmp_path, text)
    assert list(classes.label_ids) == [0, 255] and list(classes.ignored_ids) == []
    assert classes.to_train_ids()[[0, 1, 255]].tolist() == [0, 254, 1]


@pytest.mark.parametrize(
    "text",
    [
        "background\nobject\n255 void\n",
        "background\nobject\n-1 void\n",
        "1 2 3 background\n4 5 6 object\n255 void\n",
        "name,id\nbackground,0\nobject,1\nvoid,255\n",
    ],
)
def test_255_may_be_stated_to_be_ignored(tmp_path, text):
    classes = classes_of(tmp_path, text)
    assert list(classes.label_ids) == [0, 1] and list(classes.ignored_ids) == [255]


NOT_A_LINE = "is not `name`, `7 name`, `name R G B` or `7 name R G B`"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("car\n2 wheeler\n", "line 1: 'car' has no value and others have"),
        ("7 road\n# more\nsky\n", "line 3: 'sky' has no value"),
        ("7 road\n7 sky\n", "line 1: every class needs a unique value, 7 is not"),
        ("7 road\n256 sky\n", "line 2: the value of sky is '256': values are 0 to 255"),
        ("0 unlabeled\n1 crack\n", r"the file has 1 classes \(unlabeled is ignored\)"),
        # headers
        ("naam,rood,groen\nroad,1,2\nsky,3,4\n", f"line 1: 'naam,rood,groen' {NOT_A_LINE}"),
        ("Klasse;Text\nroad;grey\nsky;blue\n", f"line 1: 'Klasse;Text' {NOT_A_LINE}"),
        ("GIMP Palette\n#\n1 2 3 road\n4 5 6 sky\n", "line 1: is 'GIMP Palette' a header"),
        ("Klasse R G B\nroad 1 2 3\nsky 4 5 6\n", "line 1: is 'Klasse R G B' a header"),
        ("name,r,g,b\nroad,1,2,3\nsky,4\n", "line 3: 'sky,4' has 2 columns and the header 4"),
        ("name,id\nroad,7,8\nsky,8\n", "line 2: 'road,7,8' has 3 columns and the header 2"),
        ("id name\n7 road\n8 traffic light", "line 3: .* has 3 columns .* by commas"),
        ("name,r,g\nroad,1,2\nsky,3,4\n", "line 2: the colour is"),
        ("foo,name\n3,road\n1,sky\n", "line 2: what is 'foo'"),
        (",name\n3,road\n1,sky\n", "line 2: what is ''"),
        ("Idx,Ratio,Name\n7,0.15,road\n60,0.11,sky\n", "line 2: what is 'Ratio'"),  # ADE20K
        ("id,value,name\n0,7,road\n1,8,sky\n", "line 2: more than one id, 'value' is one"),
        ("name,id,name\nroad,7,x\nsky,8,y\n", "line 2: more than one name, 'name' is one"),
        ("name,id\nroad,7.0\nsky,8.0\n", "line 2: the value of road is '7.0'"),
        ("name,r,g,b\nroad,1,2,3\n255 void,0,0,0\n", "line 3: is '255 void' a value and a name"),
        # numbers of no clear meaning
        ("road 7\nsky 8\n", f"line 1: 'road 7' {NOT_A_LINE}"),
        ("background\nobject\nvoid 255\n", f"line 3: 'void 255' {NOT_A_LINE}"),
        ("road\nlane 2\n", f"line 2: 'lane 2' {NOT_A_LINE} .in names, write numbers as words"),
        ("road\nlane 2 - left\n", f"line 2: .* {NOT_A_LINE}"),
        ("1 2 3\n4 5 6\n", f"line 1: '1 2 3' {NOT_A_LINE}"),
        ("0\n1\n", f"line 1: '0' {NOT_A_LINE}"),
        ("road 0.5 0.2 0.5\nsky\n", f"line 1: 'road 0.5 0.2 0.5' {NOT_A_LINE}"),
        ("0 0 road\n1 1 sky\n", f"line 1: '0 0 road' {NOT_A_LINE}"),
        ("road, 7, 0, flat\nsky, 8, 1, sky\n", f"line 1: 'road, 7, 0, flat' {NOT_A_LINE}"),
        ("road 7 0\nsky 8 1\n", f"line 1: 'road 7 0' {NOT_A_LINE}"),
        ("road 7 1 2 3\nsky 8 4 5 6\n", f"line 1: 'road 7 1 2 3' {NOT_A_LINE}"),
        ("7 1 2 3 road\n8 4 5 6 sky\n", f"line 1: '7 1 2 3 road' {NOT_A_LINE}"),
        ("7 road 1 2 3 255\n8 sky 4 5 6 255\n", f"line 1: .* {NOT_A_LINE}"),  # 3D Slicer
        ("road 7.5\nsky 8.5\n", f"line 1: 'road 7.5' {NOT_A_LINE}"),
        ("1-road\n2-sky\n", f"line 1: '1-road' {NOT_A_LINE}"),
        ("1_road\n2_sky\n", f"line 1: '1_road' {NOT_A_LINE}"),
        # other signs
        ("road (7)\nsky (8)\n", f"line 1: .* {NOT_A_LINE}"),
        ("(7) road\n(8) sky\n", f"line 1: .* {NOT_A_LINE}"),
        ("* road\n* sky\n", f"line 1: .* {NOT_A_LINE}"),
        ("道路，128，64，128\n天空，1，2，3\n", f"line 1: .* {NOT_A_LINE}"),
        ('"road","1"\n"sky","2"\n', f"line 1: .* {NOT_A_LINE}"),
        ("road #fff\nsky\n", f"line 1: 'road #fff' {NOT_A_LINE}"),
        ("#804080 road\n#4682b4 sky\n", f"line 1: '#804080 road' {NOT_A_LINE}"),
        ("road:1,2,3:a,b:\nsky:1,2,3::\n", f"line 1: .* {NOT_A_LINE}"),
        ("names:\n  0: road\n- 1: sky\n", f"line 3: .* {NOT_A_LINE}"),
        ("names: ['road', 'sky']\n", f"line 1: .* {NOT_A_LINE}"),
        ('["road", "sky"', "it is not a JSON list"),
        ("[7] road\n[8] sky\n", "it is not a JSON list"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.txt: {message}"):
        classes_of(tmp_path, text)
