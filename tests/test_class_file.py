"""Files of classes in every common form: read as they are meant, or refused with the line."""

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
    classes = classes_of(tmp_path, "traffic light 250 170 30\nWeg Straße\nlane 2\n木 1,2,3\n")
    assert list(classes.names) == ["traffic light", "Weg Straße", "lane 2", "木"]
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
        ("road 1 2 256\nsky\n", r"the colour of road is \[1, 2, 256\]: give three integers"),
        ("road 1 2 3\n", "has 1 classes: give 2 to 254"),
        ("road\nignore\n", "has 1 classes"),
        ("# road\n\n", "has 0 classes"),
        ("".join(f"c{n}\n" for n in range(255)), "has 255 classes"),
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
        ('[{"color": [1, 2, 3]}, "sky"]', r"class 1: {'color': \[1, 2, 3\]} has no name"),
        ('{"classes": ["a", "b"], "palette": [[1, 2, 3]]}', "it has 2 classes and 1 colours"),
        ('[{"name": "a", "id": 3}, {"name": "b"}]', "class 2: 'b' has no value and others have"),
        ('[{"name": "a", "id": 300}, "b"]', "class 1: the value of a is 300: values are 0 to 255"),
        ('[["road", [1, 2, 3]]]', "is not a JSON list of"),
        ('["road", "road"]', "'road' is not"),
        ('["road", ""]', "'' is not"),
        ('["road"]', "has 1 classes"),
        ('{"road": [7, [1, 2, 3]], "sky": null}', r"the colour of road is \[7, \[1, 2, 3\]\]"),
        ('{"road": 1, "road": 2}', "'road' is there twice"),
        ('{"x": ["a", "b"], "y": ["c"]}', "are the classes under x or y"),
        ('{"train": {"images": 5}, "info": {"x": 1}}', "'train' is no class"),
        ('[{"name": null}, "sky"]', "class 1: {'name': None} has no name"),
        ('[{"name": ["a"]}, "sky"]', "class 1: {'name': .'a'.} has no name"),
        ('[{"name": "a", "id": 5037}, "b"]', "the value of a is 5037: .* ids of a database"),
        ('[{"name": "a", "foo": 5}, {"name": "b", "foo": 3}]', "is 'foo' the value"),
        ('{"classes": ["a", "b"], "palette": 5}', "it has 2 classes and"),
        ("[" * 100000, "is not a JSON list of"),
        ("9" * 5000, "is not a JSON list of"),
        ('{"road": [1, 2], "sky": null}', r"the colour of road is \[1, 2\]"),
        ('{"road": [1, 2, 3.5], "sky": null}', r"the colour of road is \[1, 2, 3.5\]"),
        ('{"road": [1, 2, -3], "sky": null}', r"the colour of road is \[1, 2, -3\]"),
        ('{"road": [1, 2, true], "sky": null}', r"the colour of road is \[1, 2, True\]"),
        ('{"road": "red", "sky": null}', "the colour of road is"),
    ],
)
def test_wrong_json_files(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.json.*{message}"):
        classes_of(tmp_path, text, "classes.json")


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Straße\nWeg\n".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("road\nsky\n".encode("utf-16"))
    for name in ("latin.txt", "wide.txt"):
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
        "name,r,g,b\nroad,128,64,128\ntraffic light,70,130,180\n",
        "Class Name\tR\tG\tB\nroad\t128\t64\t128\ntraffic light\t70\t130\t180\n",
        "label r g b\nroad 128 64 128\ntraffic light 70 130 180\n",
        "r,g,b,name\n128,64,128,road\n70,130,180,traffic light\n",
        "name,b,g,r\nroad,128,64,128\ntraffic light,180,130,70\n",
        ',name,color\n0,road,"128, 64, 128"\n1,traffic light,#4682b4\n',  # pandas
        "# label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:70,130,180:a,b:\n",
        "label:color_rgb:parts:actions\nroad:128,64,128::\ntraffic light:70,130,180:a,b:\n",
        "128 64 128\troad\n70 130 180\t\ttraffic light\n",  # CamVid
        "road #804080 # where cars are\ntraffic light #4682B4\n",
        "road (128, 64, 128)\ntraffic light: rgb(70, 130, 180)\n",
        "- road: 128 64 128\n- traffic light: 70 130 180\n",
        '"road","128","64","128"\n"traffic light","70","130","180"\n',
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
        "names:\n  7: road\n  60: traffic light\n",  # YAML
        "7. road\n60. traffic light\n",
        "7 - road\n60 - traffic light\n",
        "7,road,128,64,128\n60,traffic light,70,130,180\n",
        "road 7\ntraffic light 60\n",
        "road=7\ntraffic light=60\n",
        "id,name\n7,road\n60,traffic light\n",
        "label;value\r\nroad;7\r\ntraffic light;60\r\n",
        "Idx,Ratio,Stuff,Name\n7,0.15,1,road\n60,0.11,1,traffic light\n",  # ADE20K
        [{"id": 7, "name": "road"}, {"id": "60", "name": "traffic light"}],
        {"categories": [{"id": 7, "name": "road"}, {"id": 60, "name": "traffic light"}]},  # COCO
        {"7": "road", "60": "traffic light"},
        {"road": 7, "traffic light": 60},
        {"id2label": {"7": "road", "60": "traffic light"}, "label2id": {}},  # Hugging Face
        {"road": {"id": 7}, "traffic light": {"value": 60}},
        {"7": {"name": "road"}, "60": {"name": "traffic light"}},
    ],
)
def test_values_in_text_and_json(tmp_path, text):
    if isinstance(text, str):
        classes = classes_of(tmp_path, text)
    else:
        classes = classes_of(tmp_path, json.dumps(text), "classes.json")
    assert list(classes.names) == list(COLORS) and list(classes.label_ids) == [7, 60]


@pytest.mark.parametrize(
    "content",
    [
        {"classes": ["road", "traffic light"], "palette": [ROAD, SKY]},  # mmsegmentation
        {"classes": [{"title": "road", "color": "#804080"}, {"title": "traffic light"}]},
        {
            "labels": [
                {"readable": "Road", "name": "road", "color": ROAD},
                {"name": "traffic light"},
            ]
        },
    ],
)
def test_colours_in_json(tmp_path, content):
    classes = classes_of(tmp_path, json.dumps(content), "classes.json")
    assert list(classes.names) == list(COLORS) and classes.colors[0] == ROAD


@pytest.mark.parametrize(
    "content",
    [
        {"objects": [{"name": "road"}, {"name": "sky"}]},  # Encord
        {"tools": [{"name": "road"}, {"name": "sky"}], "classifications": []},  # Labelbox
        {"version": 1, "annotation_classes": [{"name": "road"}, {"name": "sky"}]},  # V7
        [{"name": "x", "evaluate": False}, {"name": "road", "evaluate": True}, "sky"],  # Mapillary
        [{"name": "x", "ignore": True}, "road", "sky"],
        ["don't care", "road", "sky", "Un-labeled", "ignore_region"],
        [{"name": "road", "id": 7.0}, {"name": "sky", "id": "8.0"}],
        [{"name": "road", "category_id": 7}, {"name": "sky", "category_id": 8}],
    ],
)
def test_more_json(tmp_path, content):
    """In a text file too."""
    for name in ("classes.json", "classes.txt"):
        classes = classes_of(tmp_path, json.dumps(content, indent=1), name)
        assert list(classes.names) == ["road", "sky"]


def test_labelme_begins_with_ignored_pixels_and_the_background(tmp_path):
    classes = classes_of(tmp_path, "__ignore__\n_background_\ncat\ndog\n")
    assert dict(zip(classes.names, classes.label_ids, strict=True)) == {
        "_background_": 0, "cat": 1, "dog": 2,
    }  # fmt: skip
    assert list(classes.ignored_ids) == [255]


def test_a_header_of_one_word_is_no_class(tmp_path):
    for header in ("name", "Classes:", "label", "class_name", "Class names:", "[classes]"):
        assert list(classes_of(tmp_path, f"{header}\nroad\nsky\n").names) == ["road", "sky"]


def test_the_table_of_cityscapes(tmp_path):
    """With ids, trainIds and -1, which is stored as 255."""
    table = [
        {"name": "ego vehicle", "id": 1, "trainId": 255, "ignoreInEval": True},
        {"name": "road", "id": 7, "trainId": 0, "color": ROAD},
        {"name": "sky", "id": 23, "trainId": 10},
        {"name": "license plate", "id": -1, "trainId": -1},
    ]
    classes = classes_of(tmp_path, json.dumps(table), "classes.json")
    assert list(classes.names) == ["road", "sky"] and list(classes.label_ids) == [7, 23]
    assert list(classes.ignored_ids) == [1, 255]


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


def test_255_may_be_stated_to_be_ignored(tmp_path):
    classes = classes_of(tmp_path, "background\nobject\n255 void\n")
    assert list(classes.label_ids) == [0, 1] and list(classes.ignored_ids) == [255]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("road 7\nsky 8\n255 void", {"road": 7, "sky": 8}),
        ("road,7\nsky,8\n255 void", {"road": 7, "sky": 8}),
        ("road 0\nsky 1\ncar 2\n255 void", {"road": 0, "sky": 1, "car": 2}),
        ("bg 0\n255 obj", {"bg": 0, "obj": 255}),
        ("128 64 128 road\n1 2 3 sky\n255 void", {"road": 0, "sky": 1}),
        ("#804080 road\n#010203 sky\n255 void", {"road": 0, "sky": 1}),
        ("name,r,g,b\nroad,1,2,3\nsky,4,5,6\n255 void", {"road": 0, "sky": 1}),
        ("name,r,g,b\nroad,1,2,3\nsky,4,5,6\n255 void,0,0,0", {"road": 0, "sky": 1}),
        ("name r g b\nroad 1 2 3\nsky 4 5 6\n255 void 0 0 0", {"road": 0, "sky": 1}),
        ("name;id\nroad;7\nsky;8\n255 obj\n", {"road": 7, "sky": 8, "obj": 255}),
        ("road 0\nsky 1\nvoid -1", {"road": 0, "sky": 1}),
        ("road\nsky\n-1 void", {"road": 0, "sky": 1}),
        ("1 road 128 174 128 255\n2 sky 1 2 3 255\n", {"road": 1, "sky": 2}),  # 3D Slicer
        ("0  road  0 0 0 0\n2  sky  245 245 245 0\n", {"road": 0, "sky": 2}),  # FreeSurfer
        ("sep=;\nname;number\nroad;7\nsky;8\n;\n", {"road": 7, "sky": 8}),
        ("name,description\nroad,grey\nsky,blue\n,,,\n", {"road": 0, "sky": 1}),
        ("Unnamed: 0,name\n0,road\n1,sky\n", {"road": 0, "sky": 1}),
        ("mask_value,name\n7.0,road\n8.0,sky\n", {"road": 7, "sky": 8}),
        ("name,color_r,color_g,color_b\nroad,1,2,3\nsky,4,5,6\n", {"road": 0, "sky": 1}),
        ("(1) road\n(2) sky\n", {"road": 1, "sky": 2}),
        ("[1] road\n[2] sky\n", {"road": 1, "sky": 2}),
        ("road (7)\nsky (8)\n", {"road": 7, "sky": 8}),
        ("7.0 road\n8.0 sky\n", {"road": 7, "sky": 8}),
        ("* road\n- sky\n", {"road": 0, "sky": 1}),
        ("道路，128，64，128\n天空，1，2，3\n", {"道路": 0, "天空": 1}),
        ("5\n7\n", {"5": 5, "7": 7}),
        ("road\nlane 2 - left\n", {"road": 0, "lane 2 - left": 1}),
        ("road\n2-wheeler\n", {"road": 0, "2-wheeler": 1}),
        ("id name\n7 road\n8 traffic light\n255 void", {"road": 7, "traffic light": 8}),
    ],
)
def test_each_name_keeps_its_value(tmp_path, text, values):
    classes = classes_of(tmp_path, text)
    assert dict(zip(classes.names, classes.label_ids, strict=True)) == values
    assert all(value in (-1, 255) for value in classes.ignored_ids)


def test_numbers_in_names_are_no_values(tmp_path):
    assert list(classes_of(tmp_path, "lane 1\nlane 2\n").names) == ["lane 1", "lane 2"]
    assert list(classes_of(tmp_path, "0\n1\n2\n").names) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("car\n2 wheeler\n", "line 1: 'car' has no value and others have"),
        ("7 road\n# more\nsky\n", "line 3: 'sky' has no value"),
        ("7 road\n7 sky\n", "line 1: every class needs a unique value, 7 is not"),
        ("7 road\n256 sky\n", "line 2: the value of sky is '256': values are 0 to 255"),
        ("naam,rood,groen\nroad,1,2\nsky,3,4\n", "line 1: is 'naam,rood,groen' a header"),
        ("name,r,g,b\nroad,1,2,3\nsky,4\n", "line 3: 'sky,4' has fewer columns than the header"),
        ("GIMP Palette\n#\n1 2 3 road\n4 5 6 sky\n", "line 1: other lines begin with a colour"),
        ("1 2 3\n4 5 6\n", "line 1: '1 2 3' is not `name`"),
        ("road 0.5 0.2 0.5\nsky\n", "line 1: 'road 0.5 0.2 0.5' is not"),
        ("0 0 road\n1 1 sky\n", "line 1: '0 0 road' is not"),
        ("road, 7, 0, flat\nsky, 8, 1, sky\n", "line 1: 'road 7 0 flat' is not"),
        ("- name: road\n  id: 7\n", "line 1: 'name: road' is not"),
        ("road 7 0\nsky 8 1\n", "line 1: what are the numbers behind 'road'"),
        ("road 7 128 64 128\nsky 8 70 130 180\n", "line 1: what are the numbers behind 'road'"),
        ("road 1 2 3 255\nsky 4 5 6 255\nvoid 0 0 0 0\n", "line 1: what are the numbers behind"),
        ("7 road 1 2 3 5\n8 sky 4 5 6 9\n", "line 1: what are the numbers behind 'road'"),
        ("7 1 2 3 road\n8 4 5 6 sky\n", "line 1: '7 1 2 3 road' is not `name`"),
        ("road 1\nsky 1\ntree 0\n", "line 1: what is the number behind 'road'"),
        ("road 7\nsky 8\nvoid\n", "line 1: what is the number behind 'road'"),
        ("0,road,7\n1,sky,8\n", "line 1: what is the number behind 'road'"),
        ("background\nobject\nvoid 255\n", "line 3: what is the number behind 'void'"),
        ("road 7.5\nsky 8.5\n", "line 1: 'road 7.5' is not"),
        ("Klasse R G B\nroad 1 2 3\nsky 4 5 6\n", "line 1: is 'Klasse R G B' a header"),
        ("Klasse Rot Gelb Blau\nroad 1 2 3\nsky 4 5 6\n", "line 1: is 'Klasse Rot Gelb Blau' a"),
        ("Klasse;Text\nroad;grey\nsky;blue\n", "line 1: is 'Klasse;Text' a header"),
        ("name,r,g\nroad,1,2\nsky,3,4\n", "the colour has only g, r: give r, g and b"),
        ("foo,name\n3,road\n1,sky\n", "is 'foo' the value in the label files"),
        ("name,color_lab\nroad,a\nsky,b\n", "is 'colorlab' the colour"),
        ("id,value,name\n0,7,road\n1,8,sky\n", "line 2: is the value of road '0', or value '7'"),
        ("name,id,name\nroad,7,x\nsky,8,y\n", "line 1: the header 'name,id,name' has a column"),
        ("name,id\nroad,7,8\nsky,8\n", "line 2: 'road,7,8' has more columns than the header"),
        ("1-road\n2-sky\n", "line 1: does '1-road' begin with its value"),
        ("1_road\n2_sky\n", "line 1: does '1_road' begin with its value"),
        ("1.road\n2.sky\n", "line 1: does '1.road' begin with its value"),
        ("path: ../x\nnc: 2\nnames:\n  0: road\n  1: sky\n", "line 2: 'nc 2' is not .* YAML"),
        ("names: ['road', 'sky']\n", "line 1: .* is not .* YAML"),
        ("0 unlabeled\n1 crack\n", r"the file has 1 classes \(unlabeled is ignored\)"),
        ("road #fff\nsky\n", "line 1: 'road #fff' is not"),
        ('["road", "sky"', "it is not a JSON list"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DatasetError, match=rf"classes\.txt: {message}"):
        classes_of(tmp_path, text)
