page.enlarge(".photo");
