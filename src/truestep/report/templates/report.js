"use strict";
for (const section of document.querySelectorAll(".frames")) {
  const triples = [...section.querySelectorAll(".triple")];
  const scrub = section.querySelector(".scrub");
  const range = scrub.querySelector("input");
  const show = () => {
    const at = Number(range.value);
    triples.forEach((triple, i) => { triple.hidden = i !== at; });
    const text = "frame " + triples[at].dataset.index;
    scrub.querySelector("output").textContent = text;
    range.setAttribute("aria-valuetext", text);
  };
  scrub.hidden = triples.length < 2;
  range.addEventListener("input", show);
  show();
}
for (const link of document.querySelectorAll("a[href^='#all']")) {
  link.addEventListener("click", () => {
    document.querySelector(link.getAttribute("href") + " details").open = true;
  });
}
const data = document.getElementById("data").textContent;
document.getElementById("download").href =
  URL.createObjectURL(new Blob([data], { type: "application/json" }));
document.getElementById("offer").hidden = false;
